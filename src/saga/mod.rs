//! The saga orchestrator: engine, log in PostgreSQL, HTTP transport, API, starts by event, the tracker of choreographed sagas, and
//! the commands for people.
//!
//! ```text
//!   POST /sagas/x, events ─► engine (memory, by partition) ─► queue ─► writer ── one commit per group ──► PostgreSQL
//!                               ▲    decide()                                │
//!                               └──── answers ◄──── transport ◄──── calls ◄──┘ only what is durable goes out
//! ```

mod answer;
mod api;
mod batch;
mod calls;
mod catalogue;
mod cli;
mod compiled;
mod connections;
mod counts;
mod engine;
mod explanation;
mod facts;
mod filter;
mod job;
mod kept;
mod key;
mod lease;
mod liveness;
mod log;
mod members;
mod meters;
mod orchestrator;
mod partitions;
pub mod problem;
mod reader;
mod session;
mod shard;
mod starts;
mod tracker;
mod transport;
pub mod view;
mod writer;

pub use crate::domain::saga::expression::EVALUATION_STACK;
use crate::shutdown::Shutdown;

/// Run the orchestrator, and list, show, start and repair sagas.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run the orchestrator: the engine and its HTTP API (the operator starts it)
    Run(orchestrator::RunArgs),
    /// Read the events of a running system, and print the choreographed sagas that they show
    Discover(tracker::DiscoverArgs),
    #[command(flatten)]
    Cli(cli::Command),
}

impl Args {
    /// A command for people, which asks a running orchestrator or the broker; the others are the orchestrator.
    pub fn is_for_people(&self) -> bool {
        matches!(self.command, Command::Cli(_) | Command::Discover(_))
    }
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    match args.command {
        Command::Cli(command) => cli::run(command).await,
        Command::Discover(args) => tracker::discover(args).await,
        Command::Run(args) => Box::pin(orchestrator::run(args, shutdown)).await,
    }
}
