//! Users and files.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl User {
    pub(super) fn named(name: &str) -> Option<Self> {
        let users = fs::read_to_string("/etc/passwd").ok()?;
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2);
        Some(Self { uid: ids.next()?.parse().ok()?, gid: ids.next()?.parse().ok()? })
    }
}

pub(super) fn own_uid() -> u32 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").expect("/proc is there").uid()
}

pub(super) fn is_root() -> bool {
    own_uid() == 0
}

/// A folder in the system's temporary folder (a checkout below `/root` is closed to the user `postgres`).
pub(super) fn accessible_folder(prefix: &str, user: Option<&User>) -> TempDir {
    let folder = tempfile::Builder::new().prefix(prefix).tempdir().expect("a temporary folder is made");
    give(folder.path(), user);
    folder
}

pub(super) fn give(path: &Path, user: Option<&User>) {
    if let Some(user) = user {
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).expect("root may give files away");
    }
}

pub(super) fn copy_folder(from: &Path, to: &Path, user: Option<&User>) {
    let mut command = Command::new("cp");
    command.arg("-a").arg(from).arg(to);
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid).current_dir("/");
    }
    assert!(command.status().expect("cp is started").success(), "{} is copied", from.display());
}

pub(super) fn weft_cache() -> Option<PathBuf> {
    let told = std::env::var_os("WEFT_CACHE").map(PathBuf::from);
    told.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/weft")))
}

/// Folders of Weft's cache whose names begin so.
pub(super) fn cached(prefix: &str) -> Vec<PathBuf> {
    let folders = weft_cache().map(installed_under).unwrap_or_default();
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    folders.into_iter().filter(named).collect()
}

pub(super) fn installed_under(folder: impl AsRef<Path>) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}
