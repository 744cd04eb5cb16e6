//! The Secret that a person gives for a broker, as the pods that use the broker mount it: whole, read again by those who need
//! it, and optional, so that a Secret that is missing keeps no pod from starting.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{SecretVolumeSource, Volume, VolumeMount};

use super::{pod::mount, reach};
use crate::domain::version::short_hash;

/// Each Secret is a folder in this one.
const FOLDER: &str = "/etc/weft/sinks";

/// The folder with a file for each of the Secret's keys.
pub fn folder(secret: &str) -> PathBuf {
    Path::new(FOLDER).join(secret)
}

/// The Secret whose folder it is.
fn secret(folder: &Path) -> Option<&str> {
    folder.strip_prefix(FOLDER).ok()?.to_str()
}

/// The Secrets whose folders a contract names. Whatever an earlier contract says, none of Weft's own is mounted.
pub fn secrets<'a>(folders: impl Iterator<Item = &'a Path>) -> BTreeSet<String> {
    let own = |secret: &&str| reach::check_secret("", "", secret).is_ok();
    folders.filter_map(secret).filter(own).map(str::to_owned).collect()
}

/// A Secret's name may be longer than a volume's.
fn name(secret: &str) -> String {
    format!("weft-sink-{}", short_hash(secret.as_bytes(), 10))
}

pub fn volume(secret: &str) -> Volume {
    let source = SecretVolumeSource {
        secret_name: Some(secret.to_owned()),
        optional: Some(true),
        ..SecretVolumeSource::default()
    };
    Volume { name: name(secret), secret: Some(source), ..Volume::default() }
}

pub fn volume_mount(secret: &str) -> VolumeMount {
    mount(&name(secret), &folder(secret).to_string_lossy())
}
