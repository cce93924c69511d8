//! The command line program: parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(zerofsctl::cli::main(std::env::args_os()))
}
