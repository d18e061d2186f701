//! The binary `trainer`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    trainer::comm::raise_open_files_limit();
    trainer::cli::main(std::env::args_os())
}
