//! Makes a plan true: server-side apply of what differs, then deletion of what is no longer planned.
//!
//! A child is sent when its hash differs from the one that is on it, or when the fields that we own on it are no longer those
//! that we applied (drift). Otherwise nothing is sent. What was applied is remembered by [`Memory`]; where that does not know,
//! a child is applied once more, which changes nothing on one that did not drift.

pub mod contest;
pub mod contract_readers;
mod memory;
mod rewritten;

use std::collections::{BTreeMap, HashSet};

use k8s_openapi::{api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy},
    core::Request,
};
use serde_json::Value;
use tokio::time::Instant;

pub use self::memory::Memory;
use self::{contest::Change, memory::Record};
use crate::{
    controllers::{
        request::{RequestError, within_deadline},
        resources::{
            child::{Child, ChildKind, ChildRef, Write},
            key::Key,
            labels::{APPLIED_HASH_ANNOTATION, FIELD_MANAGER},
            outcome::Applied,
            plan::Plan,
        },
        store::live::{ChildSeen, Live},
    },
    domain::version::short_hash,
};

/// A child as the API server answered with it.
#[derive(Debug)]
pub struct Written {
    pub child: ChildRef,
    pub seen: ChildSeen,
}

/// What one pass did.
#[derive(Debug, Default)]
pub struct Outcome {
    pub applied: Applied,
    pub written: Vec<Written>,
    /// Children that somebody else had changed or deleted, and that are now as planned again; and what had been changed.
    pub drifted: Vec<(ChildRef, Option<Change>)>,
    /// When to look again at children that are contested.
    pub again: Option<Instant>,
    /// Children that are no longer planned, and whose deletion was asked for, with their uid.
    pub deleted: Vec<(ChildRef, String)>,
}

/// What to do about one child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Not forced: if it exists and is somebody else's, that is a conflict.
    Make,
    /// Forced: it is ours.
    Update,
    /// Forced, because somebody else changed it.
    Repair,
}

impl Outcome {
    fn again_at(&mut self, instant: Instant) {
        self.again = Some(self.again.map_or(instant, |known| known.min(instant)));
    }
}

/// One pass over the children of an owner.
struct Pass<'a> {
    client: &'a Client,
    memory: &'a Memory,
    owner: &'a Key,
    /// Its children that exist.
    present: &'a BTreeMap<ChildRef, ChildSeen>,
    now: Instant,
}

/// Applies `plan`, of which `present` exists. A child that fails does not keep the others from being tried.
pub async fn apply(
    client: &Client,
    memory: &Memory,
    owner: &Key,
    present: &BTreeMap<ChildRef, ChildSeen>,
    plan: &Plan,
    now: Instant,
) -> Outcome {
    let mut outcome = Outcome::default();
    let pass = Pass { client, memory, owner, present, now };
    for child in &plan.children {
        if let Err(error) = apply_child(&pass, child, &mut outcome).await {
            outcome.applied.failures.push(error.about("apply", &child.reference()));
        }
    }
    outcome.applied.contested = memory.contested(owner);
    for (child, seen) in no_longer_planned(present, plan) {
        match delete(client, owner, child, seen).await {
            Ok(()) => {
                memory.forget_child(owner, child);
                outcome.deleted.push((child.clone(), seen.uid.clone()));
            }
            Err(error) => outcome.applied.failures.push(error.about("delete", child)),
        }
    }
    outcome
}

async fn apply_child(pass: &Pass<'_>, child: &Child, outcome: &mut Outcome) -> Result<(), RequestError> {
    let &Pass { client, memory, owner, present, .. } = pass;
    let reference = child.reference();
    match child.kind().write() {
        Write::CreateUnseen => {
            if !memory.knows_secret(owner, &reference) {
                make_once(client, owner, child).await?;
                memory.remember_secret(owner, reference);
            }
        }
        Write::CreateOnce => {
            if !present.contains_key(&reference)
                && let Some(live) = make_once(client, owner, child).await?
            {
                outcome.written.push(Written { child: reference, seen: live.into() });
            }
        }
        Write::Apply | Write::ApplyUnlessTaken => {
            let json = child.to_json()?;
            let seen = apply_difference(pass, child, &json, outcome).await?;
            if let Some(seen) = seen.as_ref().or_else(|| present.get(&reference)) {
                outcome.applied.added.extend(contest::added(&reference, seen, &json));
            }
            outcome.written.extend(seen.map(|seen| Written { child: reference, seen }));
        }
    }
    Ok(())
}

/// Sends the child if it is not as planned, unless it is contested and its turn has not come. `Some`: as it was answered with.
async fn apply_difference(
    pass: &Pass<'_>,
    child: &Child,
    json: &Value,
    outcome: &mut Outcome,
) -> Result<Option<ChildSeen>, RequestError> {
    let &Pass { client, memory, owner, present, now } = pass;
    let (reference, hash) = (child.reference(), hash(json));
    let (known, record) = (present.get(&reference), memory.record(owner, &reference));
    let step = step(&hash, known, record.as_ref());
    let rewritten = memory.rewritten(owner, &reference).filter(|_| step == Step::Nothing);
    let step = if rewritten.is_some() { Step::Repair } else { step };
    // after a restart nobody knows whether it was changed
    let changed = known.filter(|_| step == Step::Repair && record.is_some());
    let change = rewritten.or_else(|| changed.map(|known| Change::of(known, json)));
    let turn = match (&change, step) {
        (Some(change), _) => memory.found_changed(owner, &reference, change, now),
        (None, Step::Nothing) => memory.is_as_applied(owner, &reference, now),
        // another plan may want what was contested
        (None, _) => memory.forget_contest(owner, &reference),
    };
    if let Some(turn) = turn {
        outcome.again_at(turn);
    }
    if step == Step::Nothing || (change.is_some() && turn.is_some()) {
        return Ok(None);
    }
    let sent = marked(json.clone(), &hash);
    let answer = if step == Step::Make && child.kind().write() == Write::ApplyUnlessTaken {
        create(client, owner, child, &sent, false).await?
    } else {
        patch(client, owner, child.kind(), &reference.name, sent, step).await?
    };
    let fields = rewritten::rewritten(json, &answer);
    let seen = ChildSeen::from(live(answer)?);
    memory.repaired(owner, &reference, now);
    memory.set_rewritten(owner, &reference, fields, now);
    if let Some(turn) = memory.is_as_applied(owner, &reference, now) {
        outcome.again_at(turn);
    }
    if step == Step::Repair && known.is_none_or(|known| known.version != seen.version) {
        outcome.drifted.push((reference.clone(), change));
    }
    memory.remember(owner, reference, Record::new(&hash, &seen.uid, seen.ours));
    Ok(Some(seen))
}

/// Decides about one child, from what is on it and what we remember.
fn step(hash: &str, known: Option<&ChildSeen>, record: Option<&Record>) -> Step {
    match (known, record) {
        (None, None) => Step::Make,
        // the plan changed
        (Some(_), Some(record)) if record.differs_from(hash) => Step::Update,
        (Some(known), Some(record)) if record.describes(known) => Step::Nothing,
        (Some(known), None) if known.applied_hash.as_deref() != Some(hash) => Step::Update,
        // we applied it and it is not so: it was changed, replaced or deleted. Nothing remembered means a restart, and that it
        // may have drifted while nobody watched
        (None | Some(_), Some(_)) | (Some(_), None) => Step::Repair,
    }
}

fn no_longer_planned<'a>(
    present: &'a BTreeMap<ChildRef, ChildSeen>,
    plan: &'a Plan,
) -> impl Iterator<Item = (&'a ChildRef, &'a ChildSeen)> {
    let planned: HashSet<ChildRef> = plan.children.iter().map(Child::reference).collect();
    present
        .iter()
        .filter(|(_, seen)| seen.managed && !seen.deleting)
        .filter(move |(child, _)| !planned.contains(child) && !plan.retained.contains(child))
}

/// First 16 hex digits of the SHA-256 of the JSON (whose keys serde_json keeps in order).
fn hash(json: &Value) -> String {
    short_hash(json.to_string().as_bytes(), 16)
}

fn marked(mut json: Value, hash: &str) -> Value {
    if let Some(metadata) = json.get_mut("metadata").and_then(Value::as_object_mut)
        && let Some(annotations) =
            metadata.entry("annotations").or_insert_with(|| Value::Object(serde_json::Map::new())).as_object_mut()
    {
        annotations.insert(APPLIED_HASH_ANNOTATION.to_owned(), Value::String(hash.to_owned()));
    }
    json
}

async fn patch(
    client: &Client,
    owner: &Key,
    kind: ChildKind,
    name: &str,
    json: Value,
    step: Step,
) -> Result<Value, RequestError> {
    let params = PatchParams::apply(FIELD_MANAGER);
    let params = if step == Step::Make { params } else { params.force() };
    let mut request =
        collection(kind, owner).patch(name, &params, &Patch::Apply(&json)).map_err(kube::Error::BuildRequest)?;
    request.extensions_mut().insert("patch");
    within_deadline(client.request(request)).await
}

fn collection(kind: ChildKind, owner: &Key) -> Request {
    Request::new(<Live as kube::Resource>::url_path(&kind.resource(), Some(&owner.id.namespace)))
}

fn live(answer: Value) -> Result<Live, RequestError> {
    Ok(serde_json::from_value(answer).map_err(kube::Error::SerdeError)?)
}

/// Whether there is no Secret of this name, without the right to read one: its creation, which is only tried, is not refused.
pub async fn secret_is_missing(client: &Client, owner: &Key, name: &str) -> Result<bool, RequestError> {
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let child = Child::Secret(Secret { metadata, ..Secret::default() });
    match create(client, owner, &child, &child.to_json()?, true).await {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some(409) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Creates what is never changed afterwards. `None`: it exists already.
async fn make_once(client: &Client, owner: &Key, child: &Child) -> Result<Option<Live>, RequestError> {
    match create(client, owner, child, &child.to_json()?, false).await {
        Ok(answer) => live(answer).map(Some),
        Err(error) if error.code() == Some(409) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Fails with a conflict if something of this kind and name exists. An apply that is not forced finds that out by itself where
/// the two differ in a field that both set, as in the selector of a Deployment or a Service; in other kinds they need not.
async fn create(
    client: &Client,
    owner: &Key,
    child: &Child,
    json: &Value,
    dry_run: bool,
) -> Result<Value, RequestError> {
    let params = PostParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()) };
    let mut request = collection(child.kind(), owner)
        .create(&params, serde_json::to_vec(json)?)
        .map_err(kube::Error::BuildRequest)?;
    request.extensions_mut().insert("create");
    within_deadline(client.request(request)).await
}

/// Deletes this very child, and not one that was made since under its name.
pub async fn delete(client: &Client, owner: &Key, child: &ChildRef, seen: &ChildSeen) -> Result<(), RequestError> {
    let api: Api<Live> = Api::namespaced_with(client.clone(), &owner.id.namespace, &child.kind.resource());
    let params = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: Some(Preconditions { uid: Some(seen.uid.clone()), resource_version: None }),
        ..DeleteParams::default()
    };
    gone(within_deadline(api.delete(&child.name, &params)).await.map(drop))
}

/// What is not there any more (404), or is another object by now (409), is as good as deleted.
fn gone(answer: Result<(), RequestError>) -> Result<(), RequestError> {
    match answer {
        Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(hash: Option<&str>, uid: &str, ours: u64) -> ChildSeen {
        ChildSeen { applied_hash: hash.map(str::to_owned), uid: uid.to_owned(), ours, ..ChildSeen::default() }
    }

    fn record(hash: &str, uid: &str, ours: u64) -> Record {
        Record::new(hash, uid, ours)
    }

    #[test]
    fn only_what_differs_is_sent() {
        let applied = record("a", "1", 7);
        let cases = [
            ("missing, never made", None, None, Step::Make),
            ("deleted by somebody", None, Some(&applied), Step::Repair),
            ("as applied", Some(seen(Some("a"), "1", 7)), Some(&applied), Step::Nothing),
            ("drifted", Some(seen(Some("a"), "1", 8)), Some(&applied), Step::Repair),
            ("replaced by another object", Some(seen(None, "2", 0)), Some(&applied), Step::Repair),
            ("known from before a restart", Some(seen(Some("a"), "1", 7)), None, Step::Repair),
            ("of an older plan", Some(seen(Some("b"), "1", 7)), None, Step::Update),
        ];
        for (case, known, record, expected) in cases {
            assert_eq!(step("a", known.as_ref(), record), expected, "{case}");
        }
        assert_eq!(step("b", Some(&seen(Some("a"), "1", 7)), Some(&applied)), Step::Update);
    }

    #[test]
    fn what_is_retained_or_not_ours_is_not_pruned() {
        let child = |kind, name: &str| ChildRef::new(kind, name);
        let present: BTreeMap<_, _> =
            [child(ChildKind::Deployment, "orders"), child(ChildKind::Job, "old"), child(ChildKind::Service, "gone")]
                .into_iter()
                .map(|child| (child, ChildSeen { managed: true, ..seen(None, "1", 0) }))
                .chain([(child(ChildKind::Service, "exposed-by-hand"), seen(None, "2", 0))])
                .collect();
        let plan = Plan { retained: vec![child(ChildKind::Deployment, "orders")], ..Plan::default() };
        let pruned: Vec<_> = no_longer_planned(&present, &plan).map(|(child, _)| child.kind).collect();
        assert_eq!(pruned, [ChildKind::Service, ChildKind::Job]);
    }

    #[test]
    fn the_hash_is_marked_on_the_child_and_not_part_of_itself() {
        let json = serde_json::json!({"metadata": {"name": "orders"}});
        let first = hash(&json);
        assert_eq!(first.len(), 16);
        let marked = marked(json, &first);
        assert_eq!(marked["metadata"]["annotations"][APPLIED_HASH_ANNOTATION], first);
    }
}
