//! ConfigMaps whose content counts: other people's migrations, each read once per `resourceVersion`, and the pod templates
//! that were released.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::{apps::v1::Deployment, core::v1::ConfigMap};
use kube::{Api, Client, api::ListParams};

use super::Context;
use crate::{
    contract::database_setup::{is_migration, migrations_hash},
    controllers::{
        database::RELEASED_FILE,
        request::{RequestError, within_deadline},
        resources::{
            child::{ChildKind, ChildRef},
            fields::applied_template,
            key::{Key, ObjectId},
            labels::{RELEASED_ANNOTATION, TEMPLATE_HASH_ANNOTATION},
            observed::{Migrations, Released},
        },
        store::live::{ChildSeen, version},
    },
    domain::names,
};

#[derive(Debug, Default)]
pub struct ConfigMaps(Mutex<HashMap<ObjectId, (u64, Migrations)>>);

impl ConfigMaps {
    /// `watched` is the version that the watch knows; `None`: there is no such ConfigMap.
    pub async fn get(&self, client: &Client, id: ObjectId, watched: Option<u64>) -> Result<Migrations, RequestError> {
        let Some(watched) = watched else { return Ok(Migrations::Missing) };
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        if let Some((known, migrations)) = known
            && known == watched
        {
            return Ok(migrations);
        }
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &id.namespace);
        let Some(config_map) = within_deadline(api.get_opt(&id.name)).await? else { return Ok(Migrations::Missing) };
        let migrations = digest(&config_map);
        let read = version(&config_map.metadata);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (read, migrations.clone()));
        Ok(migrations)
    }
}

fn digest(config_map: &ConfigMap) -> Migrations {
    let texts = config_map.data.iter().flatten().map(|(key, text)| (key.as_str(), Cow::Borrowed(text.as_str())));
    // the set-up refuses what is not UTF-8
    let bytes = config_map.binary_data.iter().flatten();
    let bytes = bytes.map(|(key, bytes)| (key.as_str(), String::from_utf8_lossy(&bytes.0)));
    let mut files: Vec<_> = texts.chain(bytes).filter(|(key, _)| is_migration(key)).collect();
    files.sort_unstable();
    Migrations::Found {
        hash: migrations_hash(files.iter().map(|(name, text)| (*name, text.as_ref()))),
        files: files.iter().map(|(name, _)| (*name).to_owned()).collect(),
    }
}

/// The pod template that `owner`, whose children are named after `name`, released last: one request, unless it never
/// released any. Where its record was deleted, it is the one that the Deployment has.
pub async fn released(context: &Context, owner: &Key, name: &str) -> Result<Option<Box<Released>>, RequestError> {
    if context.store().set_up_annotation(owner, name, RELEASED_ANNOTATION).is_none() {
        return released_by_deployment(context, owner, name).await;
    }
    let text = file_of(context, owner, &names::setup(name), RELEASED_FILE).await?;
    Ok(text.and_then(|text| match serde_json::from_str(&text) {
        Ok(released) => Some(released),
        Err(error) => {
            tracing::warn!(%owner, %error, "the released pod template cannot be read: the Deployment stays as it is until the set-up is done");
            None
        }
    }))
}

/// A file of a ConfigMap in the namespace of `owner`: one request.
pub async fn file_of(
    context: &Context,
    owner: &Key,
    config_map: &str,
    file: &str,
) -> Result<Option<String>, RequestError> {
    let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), &owner.id.namespace);
    let config_map = within_deadline(api.get_opt(config_map)).await?;
    Ok(config_map.and_then(|config_map| config_map.data?.remove(file)))
}

/// The pod template that the Deployment has, as far as it is Weft's.
async fn released_by_deployment(
    context: &Context,
    owner: &Key,
    name: &str,
) -> Result<Option<Box<Released>>, RequestError> {
    let known = context.store().child(owner, &ChildRef::new(ChildKind::Deployment, name));
    let planned = known.filter(|known| known.annotations.contains_key(TEMPLATE_HASH_ANNOTATION) && !known.deleting);
    let Some(ChildSeen { annotations, .. }) = planned else { return Ok(None) };
    let api: Api<Deployment> = Api::namespaced(context.client.clone(), &owner.id.namespace);
    // there is no right to get one, and no need of it
    let named = ListParams::default().fields(&format!("metadata.name={name}"));
    let Some(deployment) = within_deadline(api.list(&named)).await?.items.pop() else { return Ok(None) };
    let entries = deployment.metadata.managed_fields.clone().unwrap_or_default();
    let template = applied_template(&entries, &serde_json::to_value(&deployment)?);
    let template = template.map(serde_json::from_value).transpose()?;
    Ok(template.map(|template| Box::new(Released { annotations, template })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Migrations {
        let data = files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect();
        digest(&ConfigMap { data: Some(data), ..ConfigMap::default() })
    }

    #[test]
    fn the_hash_is_the_one_that_the_set_up_reports() {
        let hash = migrations_hash([("0001.sql", "create table a()"), ("0002.sql", "create table b()")]);
        let found = of(&[("0002.sql", "create table b()"), ("README.md", "?"), ("0001.sql", "create table a()")]);
        assert_eq!(found, Migrations::Found { hash, files: vec!["0001.sql".to_owned(), "0002.sql".to_owned()] });
    }

    #[test]
    fn a_file_counts_whether_it_is_text_or_bytes() {
        let bytes = k8s_openapi::ByteString(b"create table a()".to_vec());
        let binary_data = Some([("0001.sql".to_owned(), bytes)].into());
        let found = digest(&ConfigMap { binary_data, ..ConfigMap::default() });
        assert_eq!(found, of(&[("0001.sql", "create table a()")]));
    }
}
