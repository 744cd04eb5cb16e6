//! One reconcile, whatever the kind: observe → plan → apply → status.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use tokio::time::Instant;

use super::{
    context::{Context, Verdict},
    queue::Priority,
};
use crate::{
    controllers::{
        apply::{self, Outcome, Written, contest::Change, contract_readers},
        request::RequestError,
        resources::{
            child::{ChildKind, ChildRef},
            key::Key,
            outcome::Applied,
            plan::{Plan, Rejection},
            reason::Reason,
            settings::Settings,
        },
        status::events::Notice,
        store::{FOR_EVER, Malformed, Requeue, Store, live::ChildSeen},
    },
    domain::names,
};

/// The pure half of a kind: nothing here does IO.
pub trait Kind {
    /// The custom resource (or, for an orchestrator, what its Sagas amount to).
    type Object;
    /// Everything that the plan and the status depend on besides the object itself.
    type Observed;
    /// What should be: a `Plan` of children, or a Saga's definition.
    type Planned;
    type Status;

    /// What should exist, or a sentence why that cannot be determined.
    fn plan(object: &Self::Object, observed: &Self::Observed, settings: &Settings) -> Result<Self::Planned, Rejection>;

    /// The whole status. The previous one is in `object`; conditions that did not change keep their transition time.
    fn status(
        object: &Self::Object,
        observed: &Self::Observed,
        planned: &Result<Self::Planned, Rejection>,
        applied: &Applied,
        now: Timestamp,
    ) -> Self::Status;
}

/// The half of a kind that reads and writes, by the context.
pub trait Driven: Kind<Object: Send + Sync, Observed: Send + Sync, Planned: Send + Sync, Status: Send> {
    /// The object as the store has it.
    fn find(store: &Store, key: &Key) -> Option<Arc<Self::Object>>;

    /// Everything that the plan and the status depend on. Mostly from the store; a request only for what that does not hold.
    fn observe(
        context: &Context,
        key: &Key,
        object: &Self::Object,
    ) -> impl Future<Output = Result<Self::Observed, RequestError>> + Send;

    /// Ends the pass here, with nothing written, while what is observed does not allow a conclusion yet.
    fn hold(_context: &Context, _object: &Self::Object, _observed: &Self::Observed) -> Option<Verdict> {
        None
    }

    fn is_being_deleted(_object: &Self::Object) -> bool {
        false
    }

    /// Nothing but the status is to be written.
    fn is_suspended(_object: &Self::Object) -> bool {
        false
    }

    /// Writes the finalizer of an object that has to be kept, and removes it when nothing keeps a deleted one any more: then
    /// the answer is true, and nothing else is to be done.
    fn finalize(
        _context: &Context,
        _key: &Key,
        _object: &Self::Object,
        _observed: &Self::Observed,
        _planned: &Result<Self::Planned, Rejection>,
    ) -> impl Future<Output = Result<bool, RequestError>> + Send {
        std::future::ready(Ok(false))
    }

    /// The children of what is planned.
    fn children(planned: &Self::Planned) -> &Plan;

    /// The custom resources that Events about the children concern.
    fn event_targets(object: &Self::Object) -> Vec<ObjectReference>;

    /// Whether a status of the object keeps this [`Applied::digest`].
    fn is_recorded(_object: &Self::Object, _digest: &str) -> bool {
        false
    }

    fn report(
        context: &Context,
        key: &Key,
        object: &Self::Object,
        status: Self::Status,
    ) -> impl Future<Output = Result<(), RequestError>> + Send;

    /// The object does not have its type's form, and no earlier one is known: what was made from it stays.
    fn report_malformed(
        _context: &Context,
        _key: &Key,
        _malformed: &Malformed,
    ) -> impl Future<Output = Result<(), RequestError>> + Send {
        std::future::ready(Ok(()))
    }
}

/// Brings one object to what its spec describes, as far as that is possible today.
pub async fn reconcile<K: Driven>(context: &Context, key: &Key) -> Verdict {
    let (malformed, object) = {
        let store = context.store();
        if !store.is_complete(&key.id.namespace) {
            // it is requeued when the lists of its scope are complete
            return Verdict::Done;
        }
        (store.malformed(key), K::find(&store, key))
    };
    let verdict = match (object, malformed) {
        // its children are Kubernetes' to collect
        (Some(object), _) if K::is_being_deleted(&object) => Ok(Verdict::Done),
        // of one that cannot be read any more, the last form that could be read stays in force
        (Some(object), _) => pass::<K>(context, key, &object).await,
        (None, Some(malformed)) => K::report_malformed(context, key, &malformed).await.map(|()| Verdict::Done),
        // Kubernetes collects the children
        (None, None) => {
            context.forget(key);
            Ok(Verdict::Done)
        }
    };
    verdict.unwrap_or_else(|error| {
        tracing::warn!(error = error.message(), "reconcile failed");
        Verdict::Failed(error.reason().class())
    })
}

async fn pass<K: Driven>(context: &Context, key: &Key, object: &K::Object) -> Result<Verdict, RequestError> {
    let mut observed = K::observe(context, key, object).await?;
    if let Some(verdict) = K::hold(context, object, &observed) {
        return Ok(verdict);
    }
    let not_opted_in = context.store().not_opted_in(&key.id.namespace);
    let may_write = not_opted_in.is_none() && !K::is_suspended(object);
    let mut planned = match not_opted_in {
        Some(rejection) => Err(rejection),
        None => K::plan(object, &observed, &context.settings),
    };
    let finalized = K::finalize(context, key, object, &observed, &planned).await;
    if matches!(finalized, Ok(true)) {
        return Ok(Verdict::Done);
    }
    let mut carried = Carried::default();
    let mut plans = 0;
    // a rejected object keeps what it has
    while let Ok(plan) = &planned
        && may_write
    {
        plans += 1;
        carried = carry_out::<K>(context, key, object, K::children(plan)).await;
        if carried.wrote {
            // what was written is observed too
            observed = K::observe(context, key, object).await?;
        }
        if !carried.made || plans == MAX_PLANS {
            break;
        }
        let Some(next) = grown::<K>(object, &observed, &context.settings, plan) else { break };
        planned = Ok(next);
    }
    let Carried { applied, again, .. } = carried;
    let status = K::status(object, &observed, &planned, &applied, Timestamp::now());
    let reported = K::report(context, key, object, status).await;
    if let Some(class) = applied.failures.iter().map(|failure| failure.reason.class()).min() {
        return Ok(Verdict::Failed(class));
    }
    reported?;
    finalized?;
    let recheck_in = planned.as_ref().ok().and_then(|planned| K::children(planned).recheck_in);
    let recheck = recheck_in.map(|pause| Instant::now() + pause);
    Ok(recheck.into_iter().chain(again).min().map_or(Verdict::Done, Verdict::At))
}

/// A server, its Job, and what was made again on the way.
const MAX_PLANS: usize = 3;

/// The plan by what is observed now, if it has more than `plan`, all of which is written: the Job of a set-up, for one, is for a
/// server that exists. It is carried out in the same pass.
///
/// It is asked for only after a plan by which a child was made that did not exist, and another plan follows only if it has a child
/// that the one before does not have. A kind's children are few and need each other in one order (the server, then the Job), so there
/// are no more than [`MAX_PLANS`], whatever is observed: the rest is for the next pass. The deadline of a reconcile is over all of them.
fn grown<K: Driven>(
    object: &K::Object,
    observed: &K::Observed,
    settings: &Settings,
    plan: &K::Planned,
) -> Option<K::Planned> {
    let next = K::plan(object, observed, settings).ok()?;
    K::children(&next).has_more_than(K::children(plan)).then_some(next)
}

/// What [`carry_out`] did.
#[derive(Default)]
struct Carried {
    applied: Applied,
    /// When to do so again, if it is known.
    again: Option<Instant>,
    /// The store has changed by it.
    wrote: bool,
    /// All children are written, and some of them for the first time.
    made: bool,
}

/// Applies a plan, and updates the store at once, before the watches do.
async fn carry_out<K: Driven>(context: &Context, key: &Key, object: &K::Object, plan: &Plan) -> Carried {
    let present: BTreeMap<_, _> = context.store().children(key);
    context.memory.adopt(key, &present, plan, |digest| K::is_recorded(object, digest));
    let Outcome { mut applied, written, drifted, deleted, again } =
        apply::apply(&context.client, &context.memory, key, &present, plan, Instant::now()).await;
    let wrote = !written.is_empty() || !deleted.is_empty();
    let made = applied.failures.is_empty() && written.iter().any(|one| !present.contains_key(&one.child));
    let changed = changed_contract(key, &present, &written);
    let mut requeue: Requeue = {
        let mut store = context.store();
        let set: Vec<_> = written.into_iter().map(|child| store.set_child(key, child.child, child.seen)).collect();
        let removed: Vec<_> =
            deleted.iter().map(|(child, uid)| store.remove_child(key, child, uid, FOR_EVER)).collect();
        set.into_iter().chain(removed).collect()
    };
    // this pass continues with what it wrote; the other keys that depend on it are requeued. So is this one where something was
    // deleted: another may have to be made in its place, and the watch reports nothing that the store does not know by then
    requeue.now.retain(|other| other != key || !deleted.is_empty());
    context.enqueue(requeue, Priority::Event);
    if let Some(version) = changed {
        let pods = context.store().contract_readers(key);
        contract_readers::notify(&context.client, &key.id.namespace, &pods, version).await;
    }
    for (child, change) in &drifted {
        report_drift(context, key, &K::event_targets(object), child, change.as_ref());
    }
    for failure in &applied.failures {
        tracing::warn!(reason = failure.reason.as_str(), message = failure.message, "a child could not be written");
    }
    applied.digest = applied.failures.is_empty().then(|| context.memory.digest(key, plan)).flatten();
    Carried { applied, again, wrote, made }
}

fn report_drift(
    context: &Context,
    key: &Key,
    event_targets: &[ObjectReference],
    child: &ChildRef,
    change: Option<&Change>,
) {
    let kind = child.kind.as_str();
    context.metrics.drift_corrected(kind);
    tracing::info!(child = kind, name = %child.name, "drift corrected");
    let related = ObjectReference {
        kind: Some(kind.to_owned()),
        name: Some(child.name.to_string()),
        namespace: Some(key.id.namespace.to_string()),
        ..ObjectReference::default()
    };
    let notice = Notice {
        warning: false,
        reason: Reason::DriftCorrected,
        message: match change {
            Some(change) => format!("{child} had been changed ({}); it is as declared again", change.sentence()),
            None => format!("{child} had been deleted or changed; it is as declared again"),
        },
        related: Some(related),
    };
    for target in event_targets {
        context.events.publish(notice.clone(), target.clone());
    }
}

/// The version of a contract that existed before and has just been changed. The record of a set-up is none.
fn changed_contract(owner: &Key, present: &BTreeMap<ChildRef, ChildSeen>, written: &[Written]) -> Option<u64> {
    let record = names::setup(&owner.id.name);
    let contracts = written.iter().filter(|one| one.child.kind == ChildKind::ConfigMap && one.child.name != record);
    let mut changed =
        contracts.filter(|one| present.get(&one.child).is_some_and(|before| before.version != one.seen.version));
    let changed = changed.next();
    changed.map(|Written { seen, .. }| seen.version)
}
