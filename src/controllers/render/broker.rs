//! The credentials by which the pods of an owner use the broker that is installed with Weft.
//!
//! They are in a Secret that is made once and never changed: its name has their fingerprint.

use std::path::PathBuf;

use k8s_openapi::{
    api::core::v1::{Secret, SecretVolumeSource, Volume, VolumeMount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{owner::Owner, pod::mount};
use crate::{
    controllers::resources::settings::Settings,
    domain::names,
    nats::accounts::{self, Access},
    secret::NATS_CREDENTIALS,
};

/// Name of the volume, and where it is mounted.
const VOLUME: (&str, &str) = ("weft-broker", "/etc/weft/broker");
/// Folder of the credentials file in the pods.
pub fn credentials_folder() -> PathBuf {
    PathBuf::from(VOLUME.1)
}

/// The name of a Secret with credentials, `NAME-broker-HASH`, and the credentials. `None` where no broker is installed with Weft.
fn credentials(owner: &str, namespace: &str, access: Access, settings: &Settings) -> Option<(String, String)> {
    let credentials = settings.broker.as_ref()?.accounts.credentials(namespace, owner, access);
    Some((names::broker_secret(owner, &accounts::fingerprint(&credentials)), credentials))
}

/// The name of [`secret`]; it costs as much.
pub fn secret_name(owner: &str, namespace: &str, access: Access, settings: &Settings) -> Option<String> {
    credentials(owner, namespace, access, settings).map(|(name, _)| name)
}

/// For the pods of `owner`; `metadata` gives it its lifetime.
pub fn secret(
    owner: &Owner,
    access: Access,
    settings: &Settings,
    metadata: impl FnOnce(String) -> ObjectMeta,
) -> Option<Secret> {
    let (name, credentials) = credentials(&owner.name, &owner.namespace, access, settings)?;
    Some(Secret {
        metadata: metadata(name),
        string_data: Some([(NATS_CREDENTIALS.to_owned(), credentials)].into()),
        ..Secret::default()
    })
}

/// The volume with a [`secret`].
pub fn volume(secret: &Secret) -> Volume {
    let secret_name = secret.metadata.name.clone();
    let secret = Some(SecretVolumeSource { secret_name, ..SecretVolumeSource::default() });
    Volume { name: VOLUME.0.to_owned(), secret, ..Volume::default() }
}

pub fn volume_mount(settings: &Settings) -> Option<VolumeMount> {
    settings.broker.as_ref().map(|_| mount(VOLUME.0, VOLUME.1))
}
