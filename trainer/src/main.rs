//! The binary `trainer`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    trainer::comm::open_files();
    trainer::cli::main(std::env::args_os())
}
