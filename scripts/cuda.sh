#!/usr/bin/env bash
# Runs a command with a CUDA toolkit: the one of this machine if it has nvcc, otherwise one from PyPI in target/cuda (1.5 GB).
# Building needs no GPU and no driver. The binary runs on machines with a driver for CUDA 13.
#
#   scripts/cuda.sh cargo build --release --features cuda
#   scripts/cuda.sh nvcc --version
#
# CUDA_COMPUTE_CAP   compute capability that candle's own kernels are compiled for; default: 80
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kit=$root/target/cuda
home=$kit/nvidia/cu13
wrapper=$root/target/nvcc
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}

# candle's build script calls $NVCC. This wrapper compiles its kernels for quantised weights and mixtures of experts, which take
# three quarters of the time, as empty files; kernels/src/gpu/unused.c defines their symbols.
mkdir -p "$wrapper"
: > "$wrapper/empty.cu"
cat > "$wrapper/nvcc.new" <<NVCC
#!/usr/bin/env bash
arguments=()
for argument in "\$@"; do
    case \$argument in
        src/mmq_gguf/*.cu | src/mmvq_gguf.cu | src/moe/*.cu) argument=$wrapper/empty.cu ;;
    esac
    arguments+=("\$argument")
done
exec nvcc "\${arguments[@]}"
NVCC
chmod +x "$wrapper/nvcc.new"
mv "$wrapper/nvcc.new" "$wrapper/nvcc"
export NVCC=$wrapper/nvcc

if command -v nvcc >/dev/null 2>&1; then
    exec "$@"
fi

say() { echo "cuda.sh: $*" >&2; }

if [ ! -e "$kit/DONE" ]; then
    python3 -m pip --version >/dev/null 2>&1 || { say "needs nvcc, or python3 with pip to fetch it"; exit 1; }
    say "fetching the toolkit into $kit"
    rm -rf "$kit"
    mkdir -p "$kit"
    version='==13.0.*'
    python3 -m pip install --quiet --disable-pip-version-check --no-cache-dir --root-user-action ignore \
        --no-deps --target "$kit" \
        "nvidia-cuda-nvcc$version" "nvidia-cuda-runtime$version" "nvidia-cuda-nvrtc$version" "nvidia-cuda-cccl$version" \
        "nvidia-cuda-crt$version" "nvidia-nvvm$version" "nvidia-cublas$version" nvidia-curand nvidia-nccl-cu13
    # As in an installed toolkit: lib64, and library names without a version.
    ln -sfn lib "$home/lib64"
    find "$kit/nvidia" -name 'lib*.so.*' | while read -r library; do
        ln -sf "$(basename "$library")" "${library%%.so.*}.so"
        [ "$(dirname "$library")" = "$home/lib" ] || ln -sf "$library" "$home/lib/"
    done
    find "$kit/nvidia" -mindepth 3 -path '*/lib/lib*.so' -not -path "$home/*" -exec ln -sf {} "$home/lib/" \;
    touch "$kit/DONE"
fi

# libcuda.so is part of the driver, not of the toolkit. Linking only needs its symbols, which the bindings of cudarc list.
if [ ! -e "$kit/stubs/libcuda.so" ]; then
    bindings=$(cargo metadata --locked --manifest-path "$root/Cargo.toml" --format-version 1 --features kernels/cuda |
        python3 -c 'import json, sys; print(*(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
    mkdir -p "$kit/stubs"
    grep -rhoE '\bfn cu[A-Z][A-Za-z0-9_]*' "$(dirname "$bindings")/src/driver/sys" | sed 's/^fn //' | sort -u |
        sed 's/.*/void &(void) {}/' > "$kit/stubs/cuda.c"
    cc -shared -Wl,-soname,libcuda.so.1 -o "$kit/stubs/libcuda.so" "$kit/stubs/cuda.c"
fi

export CUDA_HOME=$home CUDA_PATH=$home CUDA_ROOT=$home CUDA_TOOLKIT_ROOT_DIR=$home
export PATH=$home/bin:$PATH
# The stub is for the linker only: at run time it must not be found before the driver.
export LIBRARY_PATH=$kit/stubs:$home/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
export LD_LIBRARY_PATH=$home/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$@"
