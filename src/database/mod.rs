use std::path::PathBuf;

use crate::shutdown::Shutdown;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
}

/// Exit code when repeating cannot help: a migration that fails, a changed migration, a bad contract.
pub const EXIT_DEFINITE: u8 = 65;

#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {}

impl DatabaseError {
    /// Repeating cannot help; a person must change the input.
    pub fn is_definite(&self) -> bool {
        match *self {}
    }
}

pub async fn run(args: Args, _shutdown: Shutdown) -> anyhow::Result<()> {
    anyhow::bail!("not built yet: {}", args.config.display())
}
