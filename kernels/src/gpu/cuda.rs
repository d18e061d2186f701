//! Devices, memory, streams and matrix products of CUDA.

use candle_core::cuda::cudarc::cublaslt::{result as lt, sys};
use candle_core::cuda::cudarc::driver::{
    CudaContext, DevicePtr, DeviceRepr, result as driver, sys as driver_sys,
};
use candle_core::cuda::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, PoisonError};

use super::libraries;
use super::product::Matrix;

/// The number of GPUs that are visible to this process.
///
/// # Errors
/// If there is no driver, or it supports only an older CUDA than this program was built with.
pub fn device_count() -> Result<usize> {
    libraries::driver()?;
    let mut version = 0i32;
    // SAFETY: the pointer is that of a local i32.
    unsafe { driver_sys::cuDriverGetVersion(&raw mut version) }.result().map_err(candle_core::Error::wrap)?;
    let (major, minor) = libraries::cuda_version();
    if version < (1000 * major + 10 * minor) as i32 {
        bail!(
            "the driver supports CUDA {}.{}, this program needs {major}.{minor}\nhint: update the driver",
            version / 1000,
            version % 1000 / 10
        );
    }
    let count = CudaContext::device_count().map_err(candle_core::Error::wrap)?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Opens GPU number `ordinal` for training.
///
/// Its memory pool keeps freed memory, and no events are recorded, because a single stream does all the work.
///
/// # Errors
/// If there is no such GPU or no driver.
pub fn open_device(ordinal: usize) -> Result<Device> {
    let count = device_count()?;
    if ordinal >= count {
        bail!("GPU {ordinal} does not exist: {count} GPUs are visible, numbered from 0");
    }
    libraries::device()?;
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: all work is in one stream, so the uses of a tensor are ordered.
    unsafe { device.disable_event_tracking() };
    let keep = u64::MAX;
    pool(&device, |pool| {
        let attribute = driver_sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a u64.
        unsafe { driver::mem_pool::set_attribute(pool, attribute, (&raw const keep).cast_mut().cast()) }
    })?;
    Ok(Device::Cuda(device))
}

/// The bytes of GPU memory in use now, and the peak since the last [`reset_peak_memory`].
///
/// # Errors
/// If `device` is no GPU.
pub fn memory_usage(device: &Device) -> Result<(u64, u64)> {
    let device = device.as_cuda_device()?;
    let read = |attribute| {
        let mut bytes = 0u64;
        pool(device, |pool| {
            // SAFETY: the attribute is a u64.
            unsafe { driver::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()) }
        })?;
        Ok::<_, candle_core::Error>(bytes)
    };
    use driver_sys::CUmemPool_attribute as Attribute;
    Ok((read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?, read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?))
}

/// The free bytes of GPU memory.
///
/// # Errors
/// If `device` is no GPU.
pub fn free_memory(device: &Device) -> Result<u64> {
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    context.bind_to_thread().map_err(candle_core::Error::wrap)?;
    Ok(driver::mem_get_info().map_err(candle_core::Error::wrap)?.0 as u64)
}

/// Resets the peak that [`memory_usage`] reports.
///
/// # Errors
/// If `device` is no GPU.
pub fn reset_peak_memory(device: &Device) -> Result<()> {
    let zero = 0u64;
    pool(device.as_cuda_device()?, |pool| {
        let attribute = driver_sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a u64, and 0 is the only value that can be set.
        unsafe { driver::mem_pool::set_attribute(pool, attribute, (&raw const zero).cast_mut().cast()) }
    })
}

fn pool(
    device: &CudaDevice,
    f: impl FnOnce(driver_sys::CUmemoryPool) -> std::result::Result<(), driver::DriverError>,
) -> Result<()> {
    let context = device.cuda_stream().context().clone();
    context.bind_to_thread().map_err(candle_core::Error::wrap)?;
    // SAFETY: the context of the device exists.
    let pool = unsafe { driver::device::get_default_mem_pool(context.cu_device()) }
        .map_err(candle_core::Error::wrap)?;
    f(pool).map_err(candle_core::Error::wrap)
}

unsafe extern "C" {
    fn cudaGetErrorString(error: i32) -> *const c_char;
}

/// Converts the status of a launch to a result.
pub(crate) fn check(status: i32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: CUDA returns a static string for every number.
    let words = unsafe { CStr::from_ptr(cudaGetErrorString(status)) };
    bail!("a kernel could not be launched: {}", words.to_string_lossy())
}

/// The stream of a device. Its context becomes current on this thread, as a launch requires.
pub(crate) fn stream(device: &CudaDevice) -> Result<*mut c_void> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
    Ok(stream.cu_stream().cast())
}

/// The memory of a tensor on a GPU.
pub(super) struct Memory {
    tensor: Tensor,
    pointer: u64,
}

impl Memory {
    pub(super) fn of(tensor: &Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let range = super::contiguous(layout)?;
        let Storage::Cuda(cuda) = &*storage else { bail!("expected a tensor on a GPU") };
        let stream = cuda.device.cuda_stream();
        let start = match &cuda.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::F64(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
            _ => bail!("the kernels do not support {:?}", tensor.dtype()),
        };
        let pointer = start + (range.start * tensor.dtype().size_in_bytes()) as u64;
        Ok(Self { tensor: tensor.clone(), pointer })
    }

    pub(super) fn new(device: &CudaDevice, dtype: DType, count: usize) -> Result<Self> {
        let storage = match dtype {
            DType::F32 => allocate::<f32>(device, count)?,
            DType::BF16 => allocate::<bf16>(device, count)?,
            DType::F16 => allocate::<f16>(device, count)?,
            DType::F64 => allocate::<f64>(device, count)?,
            DType::U32 => allocate::<u32>(device, count)?,
            other => bail!("the kernels do not support {other:?}"),
        };
        Self::of(&Tensor::from_storage(Storage::Cuda(storage), count, BackpropOp::none(), false))
    }

    pub(super) fn tensor(self, shape: Shape) -> Result<Tensor> {
        self.tensor.reshape(shape)
    }

    pub(super) fn pointer(&self) -> *mut c_void {
        self.pointer as *mut c_void
    }
}

fn allocate<T: DeviceRepr + CudaDType>(device: &CudaDevice, count: usize) -> Result<CudaStorage> {
    // The driver rejects an allocation of 0 bytes.
    // SAFETY: a kernel writes every element before it is read, and any bits are valid numbers until then.
    let slice = unsafe { device.alloc::<T>(count.max(1))? };
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// The properties of a product that determine the algorithm of cuBLASLt. The algorithm is cached, because the
/// heuristic takes longer than a small product.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct MatmulKey {
    ordinal: usize,
    shape: [usize; 3],
    transposed: [bool; 2],
    types: [i32; 2],
    alignment: [u32; 3],
    adds: bool,
    reduced: bool,
}

struct Handle {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
}

// SAFETY: any thread may use the handle. The workspace is used only under the lock, and in the order of one
// stream.
unsafe impl Send for Handle {}

struct Cache {
    handles: BTreeMap<usize, Handle>,
    algorithms: BTreeMap<MatmulKey, sys::cublasLtMatmulAlgo_t>,
}

static CACHE: Mutex<Cache> = Mutex::new(Cache { handles: BTreeMap::new(), algorithms: BTreeMap::new() });

/// The workspace size in bytes that NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// [`super::product::multiply`]. cuBLASLt is column-major, so it computes cᵀ = bᵀ·aᵀ.
pub(super) fn multiply(
    device: &CudaDevice,
    tf32: bool,
    c: Matrix,
    beta: f32,
    alpha: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    let wrap = |error: lt::CublasError| candle_core::Error::wrap(error);
    let ordinal = device.cuda_stream().context().ordinal();
    let stream = stream(device)?;
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let Cache { handles, algorithms } = &mut *cache;
    let Handle { handle, workspace } = match handles.entry(ordinal) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => {
            let workspace = Memory::new(device, DType::F32, WORKSPACE / 4)?;
            place.insert(Handle { handle: lt::create_handle().map_err(wrap)?, workspace })
        }
    };
    let (m, k) = a.shape();
    let (_, n) = b.shape();
    let reduced = tf32 && candle_core::cuda::gemm_reduced_precision_f32();
    let key = MatmulKey {
        ordinal,
        shape: [m, n, k],
        transposed: [a.transposed, b.transposed],
        types: [super::dtype_code(a.dtype)?, super::dtype_code(c.dtype)?],
        alignment: [&a, &b, &c].map(alignment),
        adds: beta != 0.0,
        reduced,
    };
    let compute = match (a.dtype, reduced) {
        (DType::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    // SAFETY: the descriptors exist until the end of this function, and callers check that the matrices lie
    // in their memory.
    unsafe {
        let descriptors = Descriptors::new(compute, [&b, &a, &c])?;
        let Descriptors { matmul, layouts: [of_b, of_a, of_c], preference } = &descriptors;
        let algorithm = match algorithms.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                lt::get_matmul_algo_heuristic(*handle, *matmul, *of_b, *of_a, *of_c, *of_c, *preference)
                    .map_err(wrap)?
                    .algo
            }
        };
        lt::matmul(
            *handle,
            *matmul,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            b.address(),
            *of_b,
            a.address(),
            *of_a,
            c.address(),
            *of_c,
            c.address(),
            *of_c,
            &algorithm,
            workspace.pointer(),
            WORKSPACE,
            stream.cast(),
        )
        .map_err(wrap)?;
        algorithms.insert(key, algorithm);
    }
    Ok(())
}

/// Sets all elements of a matrix to 0.
pub(super) fn clear(device: &CudaDevice, x: Matrix) -> Result<()> {
    let stream = stream(device)?;
    // SAFETY: callers check that the matrix lies in its memory.
    unsafe { driver::memset_d8_async(x.address().addr() as u64, 0, x.bytes(), stream.cast()) }
        .map_err(candle_core::Error::wrap)
}

/// The largest power of two, up to 256, that divides the address of a matrix: vector loads need aligned
/// addresses.
fn alignment(x: &Matrix) -> u32 {
    1 << x.address().addr().trailing_zeros().min(8)
}

/// The descriptors of a product, which are freed on drop.
struct Descriptors {
    matmul: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    preference: sys::cublasLtMatmulPreference_t,
}

impl Descriptors {
    /// Creates the descriptors of the left factor, the right factor and the result, in the order of cuBLASLt.
    ///
    /// # Safety
    /// The result is only valid for products of matrices with these shapes and types.
    unsafe fn new(compute: sys::cublasComputeType_t, all: [&Matrix; 3]) -> Result<Self> {
        let wrap = |error: lt::CublasError| candle_core::Error::wrap(error);
        let matmul = lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(wrap)?;
        let layout = |x: &Matrix| {
            let data_type = match x.dtype {
                DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
                DType::F16 => sys::cudaDataType::CUDA_R_16F,
                _ => sys::cudaDataType::CUDA_R_32F,
            };
            lt::create_matrix_layout(data_type, x.columns as u64, x.rows as u64, x.columns as i64)
                .map_err(wrap)
        };
        let layouts = [layout(all[0])?, layout(all[1])?, layout(all[2])?];
        let preference = lt::create_matmul_pref().map_err(wrap)?;
        let made = Self { matmul, layouts, preference };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, x) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, all[0]),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, all[1]),
        ] {
            let operation = i32::from(x.transposed);
            // SAFETY: the attribute is an i32; 0 means not transposed, 1 transposed.
            unsafe {
                lt::set_matmul_desc_attribute(matmul, attribute, (&raw const operation).cast(), 4)
                    .map_err(wrap)?;
            }
        }
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        for (attribute, x) in [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, all[0]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, all[1]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, all[2]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, all[2]),
        ] {
            let bytes = alignment(x);
            // SAFETY: the attribute is a u32.
            unsafe {
                lt::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), 4)
                    .map_err(wrap)?;
            }
        }
        let workspace = WORKSPACE;
        let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is a size_t.
        unsafe {
            lt::set_matmul_pref_attribute(
                preference,
                attribute,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
            .map_err(wrap)?;
        }
        Ok(made)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: `new` has created each of them, and each is freed once. A failure to free has no
        // consequence.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.matmul);
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
            let _ = lt::destroy_matmul_pref(self.preference);
        }
    }
}
