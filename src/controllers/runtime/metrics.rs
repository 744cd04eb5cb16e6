//! What the operator measures of itself, and a layer that counts its requests.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::{Method, Request, Response};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tower::{Layer, Service};

use super::context::Verdict;
use crate::{
    controllers::{
        resources::{key::ObjectKind, outcome::Class},
        store::{ReadyCounts, Scope, Store},
    },
    metrics::operator as names,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindAndResult {
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: &'static str,
    kind: String,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindAndReady {
    kind: &'static str,
    ready: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NamespaceLabel {
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// All metrics of the operator.
#[derive(Debug)]
pub struct OperatorMetrics {
    reconciles: Family<KindAndResult, Counter>,
    durations: Family<KindLabel, Histogram>,
    requests: Family<RequestLabels, Counter>,
    drift: Family<KindLabel, Counter>,
    status_writes: Family<KindLabel, Counter>,
    leader: Gauge,
    objects: Family<KindAndReady, Gauge>,
    scopes_refused: Family<NamespaceLabel, Gauge>,
    accounts_waiting: Gauge,
    sagas: Family<StateLabel, Gauge>,
    pending: Gauge,
    published: Gauge,
}

fn histogram() -> Histogram {
    Histogram::new([0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0])
}

impl OperatorMetrics {
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let metrics = Self {
            reconciles: Family::default(),
            durations: Family::new_with_constructor(histogram),
            requests: Family::default(),
            drift: Family::default(),
            status_writes: Family::default(),
            leader: Gauge::default(),
            objects: Family::default(),
            scopes_refused: Family::default(),
            accounts_waiting: Gauge::default(),
            sagas: Family::default(),
            pending: Gauge::default(),
            published: Gauge::default(),
        };
        registry.register(names::RECONCILE, "Reconciles", metrics.reconciles.clone());
        registry.register(names::RECONCILE_DURATION, "Duration of a reconcile in seconds", metrics.durations.clone());
        registry.register(names::API_REQUESTS, "Requests to the API server", metrics.requests.clone());
        registry.register(
            names::DRIFT_CORRECTED,
            "Children put right after somebody changed them",
            metrics.drift.clone(),
        );
        registry.register(names::STATUS_WRITES, "Writes of a status", metrics.status_writes.clone());
        registry.register(names::LEADER, "1 while this process leads", metrics.leader.clone());
        registry.register(names::OBJECTS, "Custom resources by readiness", metrics.objects.clone());
        registry.register(
            names::SCOPE_REFUSED,
            "1 while the API server does not let the namespace be watched",
            metrics.scopes_refused.clone(),
        );
        registry.register(
            names::BROKER_ACCOUNTS_WAITING,
            "Namespaces for which the broker has no account yet",
            metrics.accounts_waiting.clone(),
        );
        registry.register(names::SAGA_INSTANCES, "Saga instances by state", metrics.sagas.clone());
        registry.register(names::OUTBOX_PENDING, "Outbox rows that wait", metrics.pending.clone());
        registry.register(names::OUTBOX_PUBLISHED, "Events acknowledged by brokers", metrics.published.clone());
        Arc::new(metrics)
    }

    pub fn reconciled(&self, kind: ObjectKind, verdict: Verdict, duration: Duration) {
        let kind = kind.as_str();
        let result = match verdict {
            Verdict::Done => "ok",
            Verdict::At(_) => "waiting",
            Verdict::Failed(Class::Retry) => "retry",
            Verdict::Failed(Class::Invalid) => "invalid",
            Verdict::Failed(Class::Fatal) => "fatal",
        };
        self.reconciles.get_or_create(&KindAndResult { kind, result }).inc();
        self.durations.get_or_create(&KindLabel { kind }).observe(duration.as_secs_f64());
    }

    pub fn drift_corrected(&self, kind: &'static str) {
        self.drift.get_or_create(&KindLabel { kind }).inc();
    }

    pub fn status_written(&self, kind: ObjectKind) {
        self.status_writes.get_or_create(&KindLabel { kind: kind.as_str() }).inc();
    }

    pub fn scope_refused(&self, scope: &Scope, refused: bool) {
        let label = NamespaceLabel { namespace: scope.0.clone().unwrap_or_default() };
        self.scopes_refused.get_or_create(&label).set(refused.into());
    }

    /// How many namespaces the broker has no account for.
    pub fn accounts_wait(&self, count: usize) {
        self.accounts_waiting.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub fn leading(&self, leading: bool) {
        self.leader.set(leading.into());
    }

    /// Gauges of the state of the store.
    pub fn observe(&self, store: &Store) {
        self.set_objects(&store.ready_counts());
        let totals = store.totals();
        for (state, count) in [
            ("running", totals.running),
            ("completed", totals.completed),
            ("compensated", totals.compensated),
            ("stuck", totals.stuck),
        ] {
            self.sagas.get_or_create(&StateLabel { state }).set(count);
        }
        self.pending.set(totals.pending);
        self.published.set(totals.published);
    }

    fn set_objects(&self, counts: &ReadyCounts) {
        self.objects.clear();
        for ((kind, ready), count) in counts {
            let labels = KindAndReady { kind: kind.as_str(), ready: ready.clone() };
            self.objects.get_or_create(&labels).set(*count);
        }
    }

    fn requested(&self, verb: &'static str, kind: String, code: u16) {
        self.requests.get_or_create(&RequestLabels { verb, kind, code }).inc();
    }
}

/// Counts every request of a Kubernetes client, the repetitions of its retry policy not among them.
#[derive(Clone, Debug)]
pub struct CountRequests(pub Arc<OperatorMetrics>);

impl<S> Layer<S> for CountRequests {
    type Service = CountingService<S>;

    fn layer(&self, inner: S) -> CountingService<S> {
        CountingService { inner, metrics: Arc::clone(&self.0) }
    }
}

#[derive(Clone, Debug)]
pub struct CountingService<S> {
    inner: S,
    metrics: Arc<OperatorMetrics>,
}

impl<S, B, R> Service<Request<B>> for CountingService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (kind, all) = resource(request.uri().path());
        let verb = verb(request.method(), request.uri().query().unwrap_or_default(), all);
        let metrics = Arc::clone(&self.metrics);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            metrics.requested(verb, kind, answer.as_ref().map_or(0, |answer| answer.status().as_u16()));
            answer
        })
    }
}

/// Kubernetes' verb of a request; `all`: it names a resource and no object of it.
fn verb(method: &Method, query: &str, all: bool) -> &'static str {
    match *method {
        Method::GET if query.contains("watch=true") => "watch",
        Method::GET if all => "list",
        Method::GET => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "other",
    }
}

/// The resource's plural (and sub-resource), and whether all of its objects are meant:
/// `/apis/apps/v1/namespaces/shop/deployments/orders/status` → `deployments/status`, no.
fn resource(path: &str) -> (String, bool) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let (["api", _, rest @ ..] | ["apis", _, _, rest @ ..]) = parts.as_slice() else {
        return ("discovery".to_owned(), false);
    };
    match rest {
        ["namespaces", _, plural, _, sub, ..] => (format!("{plural}/{sub}"), false),
        ["namespaces", _, plural] | [plural] => ((*plural).to_owned(), true),
        ["namespaces", _, plural, ..] | [plural, ..] => ((*plural).to_owned(), false),
        [] => ("discovery".to_owned(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_gives_the_resource_and_never_a_name() {
        for (path, kind, all) in [
            ("/apis/apps/v1/namespaces/shop/deployments/orders", "deployments", false),
            ("/apis/weft.dev/v1alpha1/namespaces/shop/sagas/create-order/status", "sagas/status", false),
            ("/apis/weft.dev/v1alpha1/microservices", "microservices", true),
            ("/api/v1/namespaces/shop/pods", "pods", true),
            ("/apis/weft.dev/v1alpha1", "discovery", false),
        ] {
            assert_eq!(resource(path), (kind.to_owned(), all));
        }
    }

    #[test]
    fn a_list_is_not_a_get() {
        assert_eq!(verb(&Method::GET, "limit=200", true), "list");
        assert_eq!(verb(&Method::GET, "watch=true&resourceVersion=7", true), "watch");
        assert_eq!(verb(&Method::GET, "", false), "get");
        assert_eq!(verb(&Method::POST, "", true), "create");
    }
}
