//! The command line: parses the arguments, starts a runtime and runs the command.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};

use crate::{controllers::operator, crds, database, relay, saga, shutdown::Shutdown};

/// A database per service, reliable events, and transactions across services, on Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "weft", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reconcile Microservices, OutboxRelays and Sagas in a cluster (the control plane)
    Operator(operator::Args),
    /// Publish a service's outbox to a broker (a sidecar that the operator starts)
    Relay(relay::Args),
    /// Run sagas: the orchestrator's engine and its HTTP API
    Saga(saga::Args),
    /// Prepare a service's database
    #[command(subcommand)]
    Database(DatabaseCommand),
    /// Print the custom resource definitions, or write each into a file of a folder
    Crds {
        /// Folder to write them to, one file each
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Print a completion script for your shell
    Completion { shell: clap_complete::Shell },
}

#[derive(Debug, Subcommand)]
enum DatabaseCommand {
    /// Create roles, Weft's tables and functions, then apply migrations; safe to repeat
    Setup(database::Args),
}

impl Cli {
    pub fn run(self) -> anyhow::Result<()> {
        // ring everywhere, so that the binary contains one crypto provider; an error means that it is installed already
        let _ = rustls::crypto::ring::default_provider().install_default();
        match self.command {
            Command::Completion { shell } => {
                clap_complete::generate(shell, &mut Self::command(), "weft", &mut std::io::stdout());
                Ok(())
            }
            Command::Crds { dir } => crds::write(dir.as_deref()).context("writing the custom resource definitions"),
            Command::Operator(args) => on_runtime(|shutdown| operator::run(args, shutdown)),
            Command::Relay(args) => on_runtime(|shutdown| relay::run(args, shutdown)),
            Command::Saga(args) => on_runtime(|shutdown| saga::run(args, shutdown)),
            Command::Database(DatabaseCommand::Setup(args)) => on_runtime(|shutdown| database::run(args, shutdown)),
        }
    }
}

/// Exit code for `main`: distinguishes a definite error in the input from one that a retry may resolve.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<database::DatabaseError>() {
        Some(error) if error.is_definite() => ExitCode::from(database::EXIT_DEFINITE),
        _ => ExitCode::FAILURE,
    }
}

fn on_runtime<F, R>(run: F) -> anyhow::Result<()>
where
    F: FnOnce(Shutdown) -> R,
    R: Future<Output = anyhow::Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async { run(Shutdown::on_signal()?).await })
}
