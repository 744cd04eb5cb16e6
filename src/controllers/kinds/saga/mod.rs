//! `Saga` gives a definition; the Sagas of a namespace that name the same orchestrator make one orchestrator together.
//!
//! Two controllers, so that the children that several Sagas own are planned in one place: `Controller` (a Saga: no children,
//! a definition or a rejection, and the status) and `OrchestratorController` (children: Deployment, Service, ConfigMap,
//! database, …; no status of its own, the Sagas report).

pub mod drain;
mod observe;
mod plan;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use jiff::Timestamp;
use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::Resource;

use crate::{
    api::v1alpha1::{Microservice, NatsSink, OutboxRelay, Saga, SagaStatus},
    contract::{Contract, database_setup::Purpose, orchestrator as contract, status::OrchestratorStatus},
    controllers::{
        database::{Placement, Stage},
        kinds::secrets,
        request::RequestError,
        resources::{
            key::{Key, ObjectId, ObjectKind},
            labels::has_drain_finalizer,
            observed::{DatabaseObserved, Workload},
            outcome::Applied,
            plan::{Plan, Rejection},
            settings::Settings,
        },
        runtime::{
            Context, PassResult, Priority, Verdict,
            driver::{Driven, Kind},
            file_of, released, report,
        },
        store::{Malformed, Requeue, Store},
    },
    domain::{choreography, names, saga::definition::Definition},
    nats::accounts::Access,
    outage::with_causes,
};

/// What the definition and the status of a Saga depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The Microservices that the Saga names (steps, undos, `onCompensated`, `startOn`, reactions) and that exist, by name.
    pub services: BTreeMap<String, Arc<Microservice>>,
    /// The OutboxRelays of the services whose events are read, those of one service oldest first.
    pub relays: Vec<Arc<OutboxRelay>>,
    /// By service: its OutboxRelay, when that cannot be read.
    pub kept_relays: BTreeMap<String, String>,
    /// The Microservices that the Saga names, that exist and cannot be read.
    pub unreadable: BTreeSet<String>,
    pub orchestrator: OrchestratorObserved,
    /// What the last pass over the orchestrator resulted in; `None` before the first one of this process.
    pub orchestrator_pass: Option<PassResult>,
}

/// What exists of an orchestrator.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OrchestratorObserved {
    /// The Deployment `NAME-orchestrator`.
    pub deployment: Option<Workload>,
    pub database: DatabaseObserved,
    /// What the contract says, when it is asked for the definitions of [`Orchestrator::kept`].
    pub contract: Option<Box<contract::Orchestrator>>,
    /// The newest `/status` of its pod; `None` until its stream gave one, and again once that has been broken for a while.
    pub status: Option<OrchestratorStatus>,
}

/// What a Saga amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Defined {
    Orchestrated { definition: Definition, start: Option<Box<Start>> },
    Choreographed(Followed),
}

impl Defined {
    /// The definition's version.
    pub fn version(&self) -> &str {
        match self {
            Self::Orchestrated { definition, .. } => &definition.version,
            Self::Choreographed(followed) => &followed.definition.version,
        }
    }

    /// What the engine runs; `None` for a saga that is only watched.
    pub fn definition(&self) -> Option<&Definition> {
        match self {
            Self::Orchestrated { definition, .. } => Some(definition),
            Self::Choreographed(_) => None,
        }
    }
}

/// A choreographed saga, and where its services publish their events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    pub definition: choreography::definition::Definition,
    pub since: Option<Timestamp>,
    /// By service.
    pub sinks: BTreeMap<String, NatsSink>,
}

/// The event that starts a Saga, and where its service's relay publishes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pub service: String,
    pub event_type: String,
    pub since: Option<Timestamp>,
    pub sink: NatsSink,
}

/// An orchestrator: a name in a namespace, and the Sagas that name it. It has no object of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Orchestrator {
    pub namespace: String,
    pub name: String,
    /// Sorted by name; those that drain among them. Each owns the children.
    pub members: Vec<Member>,
    /// Sagas that the contract defines and that cannot be read: each owns the children too.
    pub unreadable: Vec<OwnerReference>,
    /// Sagas that the contract defines and whose specs give no definition now, since they are rejected or cannot be read: the
    /// last good definition of each stays in force.
    pub kept: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub saga: Arc<Saga>,
    /// `None` when the Saga is rejected.
    pub defined: Option<Defined>,
}

/// Marker of the Saga's controller.
#[derive(Debug)]
pub struct Controller;

impl Kind for Controller {
    type Object = Saga;
    type Observed = Observed;
    type Planned = Defined;
    type Status = SagaStatus;

    fn plan(object: &Saga, observed: &Observed, settings: &Settings) -> Result<Defined, Rejection> {
        let defined = plan::define(object, observed)?;
        plan::check_brokers(&defined, settings)?;
        Ok(defined)
    }

    /// A Saga has no children of its own: what could not be written is the orchestrator's.
    fn status(
        object: &Saga,
        observed: &Observed,
        planned: &Result<Defined, Rejection>,
        _applied: &Applied,
        now: Timestamp,
    ) -> SagaStatus {
        status::status(object, observed, planned, now)
    }
}

/// Marker of the orchestrator's controller.
#[derive(Debug)]
pub struct OrchestratorController;

impl Kind for OrchestratorController {
    type Object = Orchestrator;
    type Observed = OrchestratorObserved;
    type Planned = Plan;
    /// It has no object of its own: its Sagas report.
    type Status = PassResult;

    fn plan(object: &Orchestrator, observed: &OrchestratorObserved, settings: &Settings) -> Result<Plan, Rejection> {
        plan::orchestrator(object, observed, settings)
    }

    fn status(
        _object: &Orchestrator,
        _observed: &OrchestratorObserved,
        planned: &Result<Plan, Rejection>,
        applied: &Applied,
        _now: Timestamp,
    ) -> PassResult {
        PassResult { applied: applied.clone(), rejection: planned.as_ref().err().cloned() }
    }
}

static NO_CHILDREN: Plan = Plan { children: Vec::new(), retained: Vec::new(), recheck_in: None };

impl Driven for Controller {
    fn find(store: &Store, key: &Key) -> Option<Arc<Saga>> {
        store.get(&key.id)
    }

    async fn observe(context: &Context, key: &Key, object: &Saga) -> Result<Observed, RequestError> {
        let orchestrator = Key::new(ObjectKind::Orchestrator, &key.id.namespace, &object.spec.orchestrator);
        let pass = context.result_of(&orchestrator);
        Ok(observe::observe(&context.store(), &key.id, object, pass))
    }

    /// A new leader knows no better than the old one before its first pass over the orchestrator, which requeues all its Sagas,
    /// and concludes nothing from the silence of a pod that may still report.
    fn hold(context: &Context, object: &Saga, observed: &Observed) -> Option<Verdict> {
        object.status.as_ref()?;
        if observed.orchestrator_pass.is_none() {
            return Some(Verdict::Done);
        }
        let silent = observed.orchestrator.deployment.is_some() && observed.orchestrator.status.is_none();
        context.still_listening().filter(|_| silent).map(Verdict::At)
    }

    fn is_being_deleted(object: &Saga) -> bool {
        object.metadata.deletion_timestamp.is_some() && !has_drain_finalizer(object)
    }

    async fn finalize(
        context: &Context,
        key: &Key,
        object: &Saga,
        observed: &Observed,
        planned: &Result<Defined, Rejection>,
    ) -> Result<bool, RequestError> {
        let Some(change) = drain::change(object, observed, planned) else { return Ok(false) };
        drain::write(context, key, object, change).await?;
        Ok(change == drain::Change::Remove)
    }

    fn children(_planned: &Defined) -> &Plan {
        &NO_CHILDREN
    }

    fn event_targets(object: &Saga) -> Vec<ObjectReference> {
        vec![object.object_ref(&())]
    }

    async fn report(context: &Context, key: &Key, object: &Saga, status: SagaStatus) -> Result<(), RequestError> {
        report::write(context, key, object, status).await
    }

    async fn report_malformed(context: &Context, key: &Key, malformed: &Malformed) -> Result<(), RequestError> {
        report::write_malformed::<Saga>(context, key, malformed).await
    }
}

/// `None` when it is of another version.
fn read_contract(orchestrator: &Key, text: &str) -> Option<Box<contract::Orchestrator>> {
    match contract::Orchestrator::from_yaml(text, Path::new(plan::CONTRACT_FILE)) {
        Ok(contract) => Some(Box::new(contract)),
        Err(error) => {
            let error = with_causes(&error);
            tracing::warn!(%orchestrator, error, "the contract cannot be read: a rejected Saga starts nothing until it is corrected");
            None
        }
    }
}

impl Driven for OrchestratorController {
    fn find(store: &Store, key: &Key) -> Option<Arc<Orchestrator>> {
        observe::orchestrator(store, &key.id).map(Arc::new)
    }

    async fn observe(
        context: &Context,
        key: &Key,
        object: &Orchestrator,
    ) -> Result<OrchestratorObserved, RequestError> {
        context.want_account(key);
        let name = names::orchestrator(&key.id.name);
        let mut observed = observe::observe_orchestrator(&context.store(), &key.id);
        let store = plan::store(&observed.database);
        let (exists, of_the_database) =
            (store.exists(&observed.database), store.secret_names(&name, Purpose::Orchestrator));
        let missing = secrets::missing(context, key, &name, &[Access::Consume], exists, of_the_database).await;
        observed.database.secrets.missing = missing;
        if !object.kept.is_empty() {
            let text = file_of(context, key, &name, plan::CONTRACT_FILE).await?;
            observed.contract = text.and_then(|text| read_contract(key, &text));
        }
        if !plan::stage(&key.id.namespace, &key.id.name, &observed, |stage| stage == Stage::Done) {
            observed.database.released = released(context, key, &name).await?;
        }
        Ok(observed)
    }

    fn children(planned: &Plan) -> &Plan {
        planned
    }

    fn event_targets(object: &Orchestrator) -> Vec<ObjectReference> {
        object.members.iter().map(|member| member.saga.object_ref(&())).collect()
    }

    /// Any of its Sagas may keep it.
    fn is_recorded(object: &Orchestrator, digest: &str) -> bool {
        let statuses = object.members.iter().filter_map(|member| member.saga.status.as_ref());
        statuses.filter_map(|status| status.applied_hash.as_deref()).any(|recorded| recorded == digest)
    }

    async fn report(
        context: &Context,
        key: &Key,
        object: &Orchestrator,
        result: PassResult,
    ) -> Result<(), RequestError> {
        if context.set_result(key, result) {
            let names = object.members.iter().filter_map(|member| member.saga.metadata.name.as_ref());
            let sagas = names.map(|name| Key::of(ObjectKind::Saga, &ObjectId::new(&key.id.namespace, name))).collect();
            context.enqueue(Requeue { now: sagas, paced: Vec::new() }, Priority::Event);
        }
        Ok(())
    }
}
