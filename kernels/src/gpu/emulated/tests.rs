//! Tests that the emulator finds each kind of fault, and none in a correct kernel.

use super::super::{entries, with_seed};
use super::Memory;
use candle_core::{DType, Device, Result};

#[repr(C)]
struct Fault {
    buffer: *mut f32,
    count: i32,
    kind: i32,
}

entries! {
    fault(Fault);
}

fn run(kind: i32) -> Result<()> {
    let memory = Memory::new(DType::F32, 64);
    // SAFETY: the emulator detects accesses outside of the buffer.
    unsafe { fault(&Device::Cpu, &Fault { buffer: memory.pointer().cast(), count: 64, kind }) }
}

#[test]
fn every_fault_is_found_in_every_order_of_the_threads() {
    for (kind, message) in [
        (1, "never reaches"),
        (2, "at that of"),
        (3, "which nothing has written"),
        (4, "barrier"),
        (5, "barrier"),
        (6, "out of bounds: byte 256 of a buffer of 256"),
        (7, " bytes before a buffer of 256"),
        (8, "elements 64..65 of a shared array of 64"),
        (9, "where a copy is in flight"),
        (10, "copy is in flight"),
        (11, "wait at different instructions"),
        (12, "waits for lanes of its warp"),
        (13, "uses 260 bytes of shared memory, but the launch has 256"),
        (14, "an access of 16 bytes at an address that is not a multiple"),
    ] {
        for seed in 0..8 {
            with_seed(seed);
            let error = run(kind).expect_err(&format!("fault {kind}")).to_string();
            // In some orders a thread reads before anything is written.
            let written = kind == 4 && error.contains("which nothing has written");
            assert!(error.contains(message) || written, "fault {kind}: {error}");
            assert!(error.starts_with("emulated_fault, thread "), "{error}");
        }
    }
}

#[test]
fn a_kernel_without_a_fault_runs_in_any_order() {
    for seed in 0..16 {
        with_seed(seed);
        run(0).unwrap();
    }
}

mod mutants {
    //! Kernels of this crate without one of their barriers: the emulator must report each of them.

    use crate::testing::random;

    /// The error of a launch that must fail.
    fn found(status: i32) -> String {
        super::super::check(status).expect_err("a kernel without its barrier").to_string()
    }

    unsafe extern "C" {
        fn mutant_a_norm_forward(arguments: *const std::ffi::c_void, stream: *mut std::ffi::c_void) -> i32;
        fn mutant_b_attention_forward(
            arguments: *const std::ffi::c_void,
            stream: *mut std::ffi::c_void,
        ) -> i32;
        fn mutant_c_attention_backward(
            arguments: *const std::ffi::c_void,
            stream: *mut std::ffi::c_void,
        ) -> i32;
    }

    #[test]
    fn a_norm_whose_block_sum_lacks_a_barrier_is_reported() {
        let (x, w) = (random(1, (2, 64)), random(2, 64));
        crate::norm::gpu::tests::with_arguments(&x, &w, |arguments| {
            // SAFETY: the arguments are those of the correct kernel.
            let error = found(unsafe { mutant_a_norm_forward(arguments, std::ptr::null_mut()) });
            assert!(error.contains("barrier") || error.contains("nothing has written"), "{error}");
        });
    }

    #[test]
    fn attention_that_reads_a_tile_before_all_threads_have_copied_it_is_reported() {
        crate::attention::gpu::tests::with_arguments(|forward, _| {
            // SAFETY: the arguments are those of the correct kernel.
            let error = found(unsafe { mutant_b_attention_forward(forward, std::ptr::null_mut()) });
            assert!(
                error.contains("in flight") || error.contains("barrier") || error.contains("written"),
                "{error}"
            );
        });
    }

    #[test]
    fn attention_that_overwrites_a_tile_while_others_read_it_is_reported() {
        crate::attention::gpu::tests::with_arguments(|_, backward| {
            // SAFETY: the arguments are those of the correct kernel.
            let error = found(unsafe { mutant_c_attention_backward(backward, std::ptr::null_mut()) });
            assert!(error.contains("barrier"), "{error}");
        });
    }
}
