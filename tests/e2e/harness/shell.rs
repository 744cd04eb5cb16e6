//! Programs that a person would use too: kubectl, helm, the cluster tool.

use std::{path::Path, process::Stdio};

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use super::root;

/// Output of `program`; an error has its error output.
pub async fn run(program: impl AsRef<Path>, args: &[&str]) -> Result<String> {
    let program = program.as_ref();
    let said = || format!("{} {}", program.file_name().unwrap_or_default().display(), args.join(" "));
    let command = Command::new(program)
        .args(args)
        .env("PATH", path())
        .env("WEFT_KUBECONFIG", std::env::var_os("KUBECONFIG").unwrap_or_default())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(std::time::Duration::from_mins(10), command)
        .await
        .with_context(|| format!("{} took more than ten minutes", said()))?
        .with_context(|| format!("starting {}", said()))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}\n{}{}", said(), output.status, errors, String::from_utf8_lossy(&output.stdout));
    }
    Ok(String::from_utf8(output.stdout)?)
}

pub async fn kubectl(args: &[&str]) -> Result<String> {
    run("kubectl", args).await
}

pub async fn helm(args: &[&str]) -> Result<String> {
    run("helm", args).await
}

/// The tool that made the cluster.
pub async fn cluster(args: &[&str]) -> Result<String> {
    run(root().join("tests/e2e/cluster/cluster"), args).await
}

pub async fn uninstall_releases(namespace: &str) -> Result<()> {
    let releases = helm(&["list", "--namespace", namespace, "--short"]).await?;
    for release in releases.lines() {
        helm(&["uninstall", release, "--namespace", namespace, "--ignore-not-found"]).await?;
    }
    Ok(())
}

/// The programs that the cluster tool built come first.
pub fn path() -> std::ffi::OsString {
    let cache = std::env::var_os("WEFT_CACHE").map(std::path::PathBuf::from).or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
        base.or_else(|| Some(std::path::PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
            .map(|dir| dir.join("weft"))
    });
    let own = cache.map(|cache| cache.join("bin"));
    let others = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(own.into_iter().chain(std::env::split_paths(&others))).unwrap_or(others)
}
