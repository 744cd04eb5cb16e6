//! The credentials by which the pods of an owner use the broker that is installed with Weft.
//!
//! They are in a Secret that is made once. Its name has the account's fingerprint, so a broker with other keys gets other Secrets.

use std::path::{Path, PathBuf};

use k8s_openapi::{
    api::core::v1::{Secret, SecretVolumeSource, Volume, VolumeMount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{owner::Owner, pod::mount};
use crate::{
    controllers::resources::settings::{Broker, Settings},
    domain::names,
    nats::accounts::Access,
};

/// Name of the volume, and where it is mounted.
const VOLUME: (&str, &str) = ("weft-broker", "/etc/weft/broker");
/// Key of the Secret, and name of the file that it becomes.
const FILE: &str = "nats.creds";

/// Path of the credentials file in the pods.
pub fn credentials_file() -> PathBuf {
    Path::new(VOLUME.1).join(FILE)
}

/// `NAME-broker-HASH`.
pub fn secret_name(owner: &str, namespace: &str, broker: &Broker) -> String {
    names::broker_secret(owner, &broker.accounts.fingerprint(namespace))
}

/// The Secret of that name, for the pods of `owner`.
pub fn secret(metadata: ObjectMeta, owner: &Owner, access: Access, broker: &Broker) -> Secret {
    let credentials = broker.accounts.credentials(&owner.namespace, &owner.name, access);
    Secret { metadata, string_data: Some([(FILE.to_owned(), credentials)].into()), ..Secret::default() }
}

/// `None` where no broker is installed with Weft.
pub fn volume(owner: &str, namespace: &str, settings: &Settings) -> Option<Volume> {
    let secret_name = Some(secret_name(owner, namespace, settings.broker.as_ref()?));
    let secret = Some(SecretVolumeSource { secret_name, ..SecretVolumeSource::default() });
    Some(Volume { name: VOLUME.0.to_owned(), secret, ..Volume::default() })
}

pub fn volume_mount(settings: &Settings) -> Option<VolumeMount> {
    settings.broker.as_ref().map(|_| mount(VOLUME.0, VOLUME.1))
}
