//! The credentials by which the pods of an owner use the broker that is installed with Weft.
//!
//! They are in a Secret that is made once and never changed: its name has their fingerprint.

use std::path::{Path, PathBuf};

use k8s_openapi::{
    api::core::v1::{Secret, SecretVolumeSource, Volume, VolumeMount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{owner::Owner, pod::mount};
use crate::{
    controllers::resources::settings::Settings,
    domain::names,
    nats::accounts::{self, Access},
};

/// Name of the volume, and where it is mounted.
const VOLUME: (&str, &str) = ("weft-broker", "/etc/weft/broker");
/// Key of the Secret, and name of the file that it becomes.
const FILE: &str = "nats.creds";

/// Path of the credentials file in the pods.
pub fn credentials_file() -> PathBuf {
    Path::new(VOLUME.1).join(FILE)
}

/// `NAME-broker-HASH`; `None` where no broker is installed with Weft.
pub fn secret_name(owner: &str, namespace: &str, access: Access, settings: &Settings) -> Option<String> {
    let credentials = settings.broker.as_ref()?.accounts.credentials(namespace, owner, access);
    Some(names::broker_secret(owner, &accounts::fingerprint(&credentials)))
}

/// The Secret of that name, for the pods of `owner`; `metadata` gives it its lifetime.
pub fn secret(
    owner: &Owner,
    access: Access,
    settings: &Settings,
    metadata: impl FnOnce(String) -> ObjectMeta,
) -> Option<Secret> {
    let credentials = settings.broker.as_ref()?.accounts.credentials(&owner.namespace, &owner.name, access);
    let name = names::broker_secret(&owner.name, &accounts::fingerprint(&credentials));
    Some(Secret {
        metadata: metadata(name),
        string_data: Some([(FILE.to_owned(), credentials)].into()),
        ..Secret::default()
    })
}

pub fn volume(owner: &Owner, access: Access, settings: &Settings) -> Option<Volume> {
    let secret_name = Some(secret_name(&owner.name, &owner.namespace, access, settings)?);
    let secret = Some(SecretVolumeSource { secret_name, ..SecretVolumeSource::default() });
    Some(Volume { name: VOLUME.0.to_owned(), secret, ..Volume::default() })
}

pub fn volume_mount(settings: &Settings) -> Option<VolumeMount> {
    settings.broker.as_ref().map(|_| mount(VOLUME.0, VOLUME.1))
}
