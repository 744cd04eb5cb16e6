//! The `weft` binary: the operator, the data plane, and the commands for people.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    weft::telemetry::init();
    match weft::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "weft ends");
            weft::cli::exit_code(&error)
        }
    }
}
