//! The saga orchestrator: engine, log in PostgreSQL, HTTP transport, API, starts by event, and the commands for people.
//!
//! ```text
//!   POST /sagas/x, events ─► engine (memory, by partition) ─► queue ─► writer ── one commit per group ──► PostgreSQL
//!                               ▲    decide()                                │
//!                               └──── answers ◄──── transport ◄──── calls ◄──┘ only what is durable goes out
//! ```

mod answer;
mod api;
mod catalogue;
mod cli;
mod compiled;
mod connections;
mod counts;
mod engine;
mod explanation;
mod job;
mod kept;
mod lease;
mod liveness;
mod log;
mod members;
mod meters;
mod orchestrator;
pub mod problem;
mod reader;
mod session;
mod starts;
mod transport;
pub mod view;
mod writer;

use std::path::PathBuf;

pub use crate::domain::saga::expression::EVALUATION_STACK;
use crate::shutdown::Shutdown;

/// Run the orchestrator (`--config`, or `run`), and list, show, start and repair sagas.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub struct Args {
    /// The contract file; runs the orchestrator, as `run` does
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run the orchestrator: the engine and its HTTP API (the operator starts it)
    Run(orchestrator::RunArgs),
    #[command(flatten)]
    Cli(cli::Command),
}

impl Args {
    /// A command for people, which asks a running orchestrator; the others are the orchestrator.
    pub fn is_for_people(&self) -> bool {
        matches!(self.command, Some(Command::Cli(_)))
    }
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    match args {
        Args { command: Some(Command::Cli(command)), config: _ } => cli::run(command).await,
        Args { command: Some(Command::Run(args)), config: _ } => Box::pin(orchestrator::run(args, shutdown)).await,
        Args { command: None, config: Some(config) } => {
            Box::pin(orchestrator::run(orchestrator::RunArgs::of(config), shutdown)).await
        }
        Args { command: None, config: None } => anyhow::bail!("give the contract file with --config"),
    }
}
