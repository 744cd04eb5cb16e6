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
mod counts;
mod engine;
mod log;
mod meters;
mod orchestrator;
mod people;
mod problems;
mod reader;
mod session;
mod starts;
mod transport;
pub mod view;
mod writer;

use crate::shutdown::Shutdown;

/// Run sagas, look at them, and mend them.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run the orchestrator: the engine and its HTTP API (the operator starts it)
    Run(orchestrator::RunArgs),
    #[command(flatten)]
    People(people::Command),
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    match args.command {
        Command::Run(args) => Box::pin(orchestrator::run(args, shutdown)).await,
        Command::People(command) => people::run(command).await,
    }
}
