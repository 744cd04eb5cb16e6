use std::path::PathBuf;

use crate::shutdown::Shutdown;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
}

pub async fn run(args: Args, _shutdown: Shutdown) -> anyhow::Result<()> {
    anyhow::bail!("not built yet: {}", args.config.display())
}
