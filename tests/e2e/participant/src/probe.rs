//! What a pod can reach: for the tests that say it cannot.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio_postgres::NoTls;

#[derive(clap::Args)]
pub struct Connect {
    /// HOST:PORT
    address: String,
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

/// Prints `connected`, `refused` or `no answer`.
pub async fn connect(Connect { address, seconds }: Connect) -> anyhow::Result<()> {
    let connecting = tokio::net::TcpStream::connect(&address);
    let answer = match tokio::time::timeout(Duration::from_secs(seconds), connecting).await {
        Ok(Ok(_)) => "connected",
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => "refused",
        Ok(Err(error)) => return Err(error).with_context(|| format!("connecting to {address}")),
        Err(_) => "no answer",
    };
    println!("{answer}");
    Ok(())
}

#[derive(clap::Args)]
pub struct LogIn {
    #[arg(long, env, hide_env_values = true)]
    database_url: String,
    /// Another server than the URL's
    #[arg(long)]
    host: Option<String>,
    /// Another database than the URL's
    #[arg(long)]
    database: Option<String>,
}

/// Prints `entered`, or the SQLSTATE that the server refuses with.
pub async fn log_in(LogIn { database_url, host, database }: LogIn) -> anyhow::Result<()> {
    let from: tokio_postgres::Config = database_url.parse().context("reading DATABASE_URL")?;
    let mut config = tokio_postgres::Config::new();
    config.user(from.get_user().unwrap_or_default()).password(from.get_password().unwrap_or_default());
    let there = from.get_hosts().iter().find_map(|host| match host {
        tokio_postgres::config::Host::Tcp(name) => Some(name.clone()),
        tokio_postgres::config::Host::Unix(_) => None,
    });
    let Some(host) = host.or(there) else { bail!("DATABASE_URL names no host") };
    config.host(&host).dbname(database.as_deref().or(from.get_dbname()).unwrap_or_default());
    config.connect_timeout(Duration::from_secs(3));
    let answer = match config.connect(NoTls).await {
        Ok(_) => "entered".to_owned(),
        Err(error) => match error.code() {
            Some(code) => code.code().to_owned(),
            None => return Err(error).with_context(|| format!("logging in at {host}")),
        },
    };
    println!("{answer}");
    Ok(())
}
