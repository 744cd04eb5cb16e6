//! The `weft` binary: the operator, the data plane, and the commands for people.

fn main() -> std::process::ExitCode {
    weft::cli::Cli::main()
}
