//! The command line: parses the arguments, starts a runtime and runs the command.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use tokio::runtime::Builder;

use crate::{broker, controllers::operator, crds, database, inbox, output, relay, saga, shutdown::Shutdown, telemetry};

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
    Operator(Box<operator::Args>),
    /// Publish a service's outbox to a broker; list and retry events that the broker refuses
    Relay(relay::Args),
    /// Deliver events of other services to a service; list and retry those that it does not handle
    Inbox(inbox::Args),
    /// Run sagas: the orchestrator's engine and its HTTP API
    Saga(saga::Args),
    /// Credentials and events of the broker that is installed with Weft
    #[command(subcommand)]
    Broker(broker::Command),
    /// Prepare a service's database
    #[command(subcommand)]
    Database(DatabaseCommand),
    /// Print the custom resource definitions, or write each into a file of a folder
    Crds {
        /// Folder to write them to, one file each
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Remove the finalizers of Sagas, which only an operator would: the last step of an uninstallation
    ReleaseSagas {
        /// Only in these namespaces
        #[arg(long, value_delimiter = ',')]
        namespaces: Vec<String>,
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
    /// Parses the process's arguments and runs what they ask for. An error of a program that runs in a pod goes to its log,
    /// that of a command for people in one line to standard error.
    pub fn main() -> ExitCode {
        let cli = match Self::try_parse() {
            Ok(cli) => cli,
            Err(error) => return answer_instead_of_running(&error),
        };
        let for_people = cli.command.is_for_people();
        if !for_people {
            telemetry::init();
        }
        let Err(error) = cli.run() else { return ExitCode::SUCCESS };
        if for_people {
            output::error(&format!("{error:#}"));
        } else {
            tracing::error!(error = format!("{error:#}"), "weft ends");
        }
        exit_code(&error)
    }

    fn run(self) -> anyhow::Result<()> {
        // ring everywhere, so that the binary contains one crypto provider; an error means that it is installed already
        let _ = rustls::crypto::ring::default_provider().install_default();
        match self.command {
            Command::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "weft", &mut script);
                output::answer(&String::from_utf8_lossy(&script)).context("writing the completion script")
            }
            Command::Crds { dir } => crds::write(dir.as_deref()).context("writing the custom resource definitions"),
            Command::ReleaseSagas { namespaces } => {
                on_runtime(async move |_| operator::release_sagas(&namespaces).await)
            }
            Command::Operator(args) => on(Builder::new_multi_thread().worker_threads(OPERATOR_THREADS), |shutdown| {
                operator::run(*args, shutdown)
            }),
            Command::Relay(args) => on_runtime(|shutdown| relay::run(args, shutdown)),
            Command::Inbox(args) => on_runtime(|shutdown| inbox::run(args, shutdown)),
            Command::Broker(command) => on_runtime(|_| broker::run(command)),
            Command::Saga(args) => on_runtime(|shutdown| saga::run(args, shutdown)),
            Command::Database(DatabaseCommand::Setup(args)) => on_runtime(|shutdown| database::run(args, shutdown)),
        }
    }
}

impl Command {
    /// The others run in pods, where their log is read by machines.
    fn is_for_people(&self) -> bool {
        match self {
            Self::Broker(_) | Self::Crds { .. } | Self::Completion { .. } => true,
            Self::Saga(args) => args.is_for_people(),
            Self::Relay(args) => args.is_for_people(),
            Self::Inbox(args) => args.is_for_people(),
            Self::Operator(_) | Self::Database(_) | Self::ReleaseSagas { .. } => false,
        }
    }
}

/// Help and version where they were asked for; else what is wrong with the arguments, in one line.
fn answer_instead_of_running(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // when nobody reads it, the exit code is the answer
        let _ = error.print();
    } else {
        output::error(&usage_error(&error.to_string()));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// clap's paragraphs (the error, a tip, the usage, where the help is) as clauses of one sentence, but for the last.
fn usage_error(text: &str) -> String {
    let paragraphs = text.trim().split("\n\n").filter(|paragraph| !paragraph.starts_with("For more information"));
    let clauses = paragraphs.map(|paragraph| {
        let paragraph = paragraph.trim();
        let paragraph = paragraph.strip_prefix("error: ").unwrap_or(paragraph);
        paragraph.strip_prefix("Usage: ").map_or_else(|| paragraph.to_owned(), |usage| format!("usage: {usage}"))
    });
    clauses.collect::<Vec<_>>().join("; ")
}

/// Exit code for `main`: distinguishes a definite error in the input from one that a retry may resolve.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<database::DatabaseError>() {
        Some(error) if error.is_definite() => ExitCode::from(database::EXIT_DEFINITE),
        _ => ExitCode::FAILURE,
    }
}

/// The operator's work is small steps between requests: more threads would mostly wait for each other, at the allocator too, which
/// has one arena in its pod. (With two, it used a quarter more CPU: `make bench ONLY=memory`.)
const OPERATOR_THREADS: usize = 1;

fn on_runtime<F, R>(run: F) -> anyhow::Result<()>
where
    F: FnOnce(Shutdown) -> R,
    R: Future<Output = anyhow::Result<()>>,
{
    on(&mut Builder::new_multi_thread(), run)
}

fn on<F, R>(runtime: &mut Builder, run: F) -> anyhow::Result<()>
where
    F: FnOnce(Shutdown) -> R,
    R: Future<Output = anyhow::Result<()>>,
{
    let runtime =
        runtime.enable_all().thread_stack_size(saga::EVALUATION_STACK).build().context("starting the runtime")?;
    runtime.block_on(async { run(Shutdown::on_signal()?).await })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_of_all_commands_are_well_formed() {
        Cli::command().debug_assert();
    }
}
