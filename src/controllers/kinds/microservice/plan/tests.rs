use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::ResourceRequirements;
use serde_json::{Value, json};

use super::*;
use crate::controllers::{
    fixtures::{self, find, microservice, ready, relay_of, settings, settings_with_broker},
    resources::{
        child::{ChildKind, ChildRef},
        observed::{JobOutcome, Migrations, Problem, Workload},
        reason::Reason,
        settings::Resources,
    },
};

const ORDERS: &str = r"
image: localhost/orders:1
args: [orders]
replicas: 2
ports: [{name: http, port: 8080}, {name: grpc, port: 9090, protocol: grpc}]
env: [{name: LOG, value: debug}]
database:
  postgres: {storage: {size: 2Gi, className: fast}, parameters: {max_connections: '50'}}
  migrations: {configMap: orders-migrations}
dependsOn: [{service: customers}]
";
const STATELESS: &str = "{image: 'localhost/gateway:1'}";

fn orders() -> Microservice {
    microservice("orders", ORDERS)
}

/// The store in which `object` has everything that it needs, and its set-up is done.
fn settled(object: &Microservice) -> Observed {
    let mut observed = before_setup();
    let plan = plan(object, &observed, &settings()).unwrap();
    let job = fixtures::names(&plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned));
    if let Some(job) = job {
        observed.database.jobs.insert(job, fixtures::job(JobOutcome::Succeeded));
    }
    observed
}

fn before_setup() -> Observed {
    let mut observed = Observed::default();
    observed.database.server = Some(ready(1));
    observed.database.migrations =
        Some(Migrations::Found { hash: "abc".to_owned(), files: vec!["001.sql".to_owned()] });
    let customers =
        microservice("customers", "{image: i, ports: [{name: a, port: 1, protocol: tcp}, {name: http, port: 8080}]}");
    observed.dependencies = [("customers".to_owned(), Arc::new(customers))].into();
    observed
}

/// What the runtime would observe of the Deployment that `plan` holds.
fn live(plan: &Plan) -> Workload {
    Workload { annotations: annotations(plan, "Deployment/orders"), ..ready(2) }
}

fn annotations(plan: &Plan, child: &str) -> BTreeMap<String, String> {
    serde_json::from_value(find(plan, child)["metadata"]["annotations"].clone()).unwrap()
}

#[test]
fn a_service_with_database_and_relay_as_a_whole() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    insta::assert_snapshot!(fixtures::yaml(&plan(&orders(), &observed, &settings()).unwrap()));
}

/// Names of the containers that mount a volume.
fn mounted_in(pod: &Value, volume: &str) -> Vec<String> {
    let containers = ["initContainers", "containers"].into_iter().flat_map(|list| pod[list].as_array().unwrap());
    let mounts = |container: &Value| {
        container["volumeMounts"].as_array().into_iter().flatten().any(|mount| mount["name"] == volume)
    };
    containers.filter(|one| mounts(one)).map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_relay_alone_has_the_brokers_credentials() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    let settings = settings_with_broker();
    let plan = plan(&orders(), &observed, &settings).unwrap();
    let secret = fixtures::names(&plan).into_iter().find(|name| name.starts_with("Secret/orders-broker-")).unwrap();
    let credentials = find(&plan, &secret)["stringData"]["nats.creds"].as_str().unwrap().to_owned();
    assert!(credentials.contains("BEGIN USER NKEY SEED"));
    let pod = find(&plan, "Deployment/orders")["spec"]["template"]["spec"].clone();
    assert_eq!(mounted_in(&pod, "weft-broker"), ["weft-relay"]);
    let volumes = pod["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == "weft-broker").unwrap();
    assert_eq!(format!("Secret/{}", volume["secret"]["secretName"].as_str().unwrap()), secret);
    assert!(!pod.to_string().contains(&credentials));
}

#[test]
fn a_service_without_a_relay_has_no_credentials_of_the_broker() {
    let plan = plan(&orders(), &settled(&orders()), &settings_with_broker()).unwrap();
    assert!(!fixtures::names(&plan).iter().any(|name| name.contains("broker")));
}

#[test]
fn a_service_without_database_or_ports_is_two_objects() {
    let gateway = microservice("gateway", STATELESS);
    insta::assert_snapshot!(fixtures::yaml(&plan(&gateway, &Observed::default(), &settings()).unwrap()));
}

#[test]
fn before_the_first_set_up_there_is_no_deployment() {
    for outcome in [JobOutcome::Running, JobOutcome::Failed { message: "002.sql: no".to_owned() }] {
        let mut observed = settled(&orders());
        for job in observed.database.jobs.values_mut() {
            job.outcome = outcome.clone();
        }
        let plan = plan(&orders(), &observed, &settings()).unwrap();
        assert!(!fixtures::names(&plan).contains(&"Deployment/orders".to_owned()));
        assert!(plan.retained.contains(&ChildRef::new(ChildKind::Deployment, "orders")));
    }
}

#[test]
fn other_migrations_are_another_job() {
    let mut observed = settled(&orders());
    observed.database.migrations =
        Some(Migrations::Found { hash: "def".to_owned(), files: vec!["001.sql".to_owned()] });
    let plan = plan(&orders(), &observed, &settings()).unwrap();
    let job = fixtures::names(&plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned)).unwrap();
    assert!(!observed.database.jobs.contains_key(&job), "{job} is the old one");
    assert!(!fixtures::names(&plan).contains(&"Deployment/orders".to_owned()));
}

#[test]
fn another_operator_makes_no_other_job_and_restarts_nothing() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    let first = plan(&orders(), &observed, &settings()).unwrap();
    observed.deployment = Some(live(&first));
    observed.database.server = Some(Workload { annotations: annotations(&first, "StatefulSet/orders-db"), ..ready(1) });
    let mut newer = settings();
    newer.image = "localhost/weft:2".to_owned();
    newer.image_pull_policy = Some("Always".to_owned());
    newer.resources.relay = ResourceRequirements::default();
    newer.resources.database = ResourceRequirements::default();
    let second = plan(&orders(), &observed, &newer).unwrap();
    assert_eq!(fixtures::names(&first), fixtures::names(&second));
    for child in ["Deployment/orders", "StatefulSet/orders-db"] {
        assert_eq!(find(&first, child), find(&second, child));
    }

    let mut asking = orders();
    asking.metadata.annotations = Some([("weft.dev/upgrade".to_owned(), "now".to_owned())].into());
    let third = plan(&asking, &observed, &newer).unwrap();
    let sidecar = &find(&third, "Deployment/orders")["spec"]["template"]["spec"]["initContainers"][0];
    assert_eq!((&sidecar["image"], &sidecar["imagePullPolicy"]), (&json!("localhost/weft:2"), &json!("Always")));
    assert_eq!(sidecar["resources"], json!({}));
}

#[test]
fn containers_have_the_resources_that_the_operator_is_given() {
    let amount = |memory: &str| serde_json::from_value(json!({"limits": {"memory": memory}})).unwrap();
    let mut settings = settings();
    settings.resources =
        Resources { database: amount("1Gi"), orchestrator: amount("2Gi"), relay: amount("3Gi"), setup: amount("4Gi") };
    let limit = |child: &serde_json::Value, containers: &str| {
        child["spec"]["template"]["spec"][containers][0]["resources"]["limits"]["memory"].clone()
    };
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    let done = plan(&orders(), &observed, &settings).unwrap();
    assert_eq!(limit(&find(&done, "Deployment/orders"), "initContainers"), "3Gi");
    assert_eq!(limit(&find(&done, "StatefulSet/orders-db"), "containers"), "1Gi");
    let first = plan(&orders(), &before_setup(), &settings).unwrap();
    let job = first.children.iter().map(fixtures::value).find(|child| child["kind"] == "Job").unwrap();
    assert_eq!(limit(&job, "containers"), "4Gi");

    let mut own = orders();
    own.spec.database.as_mut().unwrap().postgres.as_mut().unwrap().resources = Some(amount("5Gi"));
    let own = plan(&own, &observed, &settings).unwrap();
    assert_eq!(limit(&find(&own, "StatefulSet/orders-db"), "containers"), "5Gi", "the spec's go first");
}

#[test]
fn a_set_up_that_the_operators_configuration_keeps_from_running_gives_way_to_one_of_another() {
    let mut observed = settled(&orders());
    for job in observed.database.jobs.values_mut() {
        job.outcome = JobOutcome::Running;
        job.annotations = [("weft.dev/defaults".to_owned(), r#"{"image": "localhost/weft:0"}"#.to_owned())].into();
    }
    let has_job = |observed: &Observed| {
        let plan = plan(&orders(), observed, &settings()).unwrap();
        fixtures::names(&plan).iter().any(|name| name.starts_with("Job/"))
    };
    assert!(has_job(&observed), "it may only be slow");
    let mut with = |missing_images: Vec<String>, problems: Vec<Problem>, annotations: &BTreeMap<String, String>| {
        for job in observed.database.jobs.values_mut() {
            (job.missing_images, job.problems) = (missing_images.clone(), problems.clone());
            job.annotations = annotations.clone();
        }
        has_job(&observed)
    };
    let killed = vec![Problem::new(Reason::OutOfMemory, "needs more memory than its limit allows")];
    let older = BTreeMap::from([("weft.dev/defaults".to_owned(), r#"{"image": "localhost/weft:0"}"#.to_owned())]);
    assert!(!with(vec!["localhost/weft:0".to_owned()], vec![], &older));
    assert!(!with(vec![], killed.clone(), &older));
    let same = settings().defaults(&settings().resources.setup);
    let same = BTreeMap::from([("weft.dev/defaults".to_owned(), serde_json::to_string(&same).unwrap())]);
    assert!(with(vec![settings().image], killed, &same), "another would be the same");
}

#[test]
fn missing_migrations_make_no_job() {
    for missing in
        [None, Some(Migrations::Missing), Some(Migrations::Found { hash: "a".to_owned(), files: Vec::new() })]
    {
        let mut observed = settled(&orders());
        observed.database.migrations = missing;
        let plan = plan(&orders(), &observed, &settings()).unwrap();
        assert!(
            fixtures::names(&plan).iter().all(|name| !name.starts_with("Job/") && !name.starts_with("Deployment/"))
        );
    }
}

#[test]
fn the_services_own_variables_win() {
    let mut object = orders();
    object.spec.env.push(serde_json::from_value(json!({"name": "DATABASE_URL", "value": "mine"})).unwrap());
    let plan = plan(&object, &settled(&object), &settings()).unwrap();
    let env = find(&plan, "Deployment/orders")["spec"]["template"]["spec"]["containers"][0]["env"].clone();
    let named: Vec<_> = env.as_array().unwrap().iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(named, ["SERVICE_BINDING_ROOT", "CUSTOMERS_URL", "LOG", "DATABASE_URL"]);
    assert_eq!(env[1]["value"], "http://customers:8080");
    assert_eq!(env[3]["value"], "mine");
}

#[test]
fn a_dependency_that_is_gone_for_a_while_restarts_nothing() {
    let mut observed = settled(&orders());
    let first = plan(&orders(), &observed, &settings()).unwrap();
    observed.deployment = Some(live(&first));
    observed.dependencies = BTreeMap::new();
    let second = plan(&orders(), &observed, &settings()).unwrap();
    assert_eq!(find(&first, "Deployment/orders"), find(&second, "Deployment/orders"));
}

#[test]
fn a_dependency_that_never_was_has_no_variable_and_stops_nothing() {
    let mut observed = settled(&orders());
    observed.dependencies = BTreeMap::new();
    let plan = plan(&orders(), &observed, &settings()).unwrap();
    assert!(!find(&plan, "Deployment/orders").to_string().contains("CUSTOMERS_URL"));
}

#[test]
fn the_overlay_comes_last() {
    let mut object = orders();
    object.spec.pod_template =
        Some(json!({"spec": {"containers": [{"name": "service", "image": "other:1"}], "priorityClassName": "high"}}));
    let plan = plan(&object, &settled(&object), &settings()).unwrap();
    let pod = &find(&plan, "Deployment/orders")["spec"]["template"]["spec"];
    assert_eq!((&pod["containers"][0]["image"], &pod["priorityClassName"]), (&json!("other:1"), &json!("high")));
}

#[test]
fn a_broken_overlay_is_refused_before_the_set_up_runs() {
    let mut object = orders();
    object.spec.pod_template = Some(json!({"spec": {"hostNetwork": "yes"}}));
    assert_eq!(plan(&object, &before_setup(), &settings()).unwrap_err().reason, Reason::InvalidPodTemplate);
}

#[test]
fn only_the_relay_sees_the_relays_password() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders"), relay_of("second")];
    let plan = plan(&orders(), &observed, &settings()).unwrap();
    let pod = &find(&plan, "Deployment/orders")["spec"]["template"]["spec"];
    assert_eq!(pod["initContainers"].as_array().unwrap().len(), 1);
    assert!(pod["initContainers"].to_string().contains("weft-relay-role"));
    assert!(!pod["containers"].to_string().contains("weft-relay-role"));
    assert!(pod.to_string().contains("orders-relay"), "the oldest relay has the outbox");
}

#[test]
fn a_relay_that_cannot_be_read_keeps_its_sidecar() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    let before = find(&plan(&orders(), &observed, &settings()).unwrap(), "Deployment/orders");
    // after a restart of the operator; a younger relay does not get the outbox meanwhile
    observed.relays = vec![relay_of("younger")];
    observed.kept_relay = before["metadata"]["annotations"]["weft.dev/relay"].as_str().map(str::to_owned);
    assert_eq!(find(&plan(&orders(), &observed, &settings()).unwrap(), "Deployment/orders"), before);
}

#[test]
fn a_relay_that_cannot_be_read_keeps_its_slot() {
    let mut observed = settled(&orders());
    let planned = plan(&orders(), &observed, &settings()).unwrap();
    let recorded = find(&planned, "ConfigMap/orders-db-setup")["metadata"]["annotations"]["weft.dev/set-up"].clone();
    observed.database.recorded = serde_json::from_str(recorded.as_str().unwrap()).unwrap();
    observed.kept_relay = Some("orders".to_owned());
    let jobs = |observed: &Observed| {
        let plan = plan(&orders(), observed, &settings()).unwrap();
        fixtures::names(&plan).into_iter().filter(|name| name.starts_with("Job/")).count()
    };
    observed.database.recorded.as_mut().unwrap().replication_slot = true;
    assert_eq!(jobs(&observed), 0);
    observed.kept_relay = None;
    assert_eq!(jobs(&observed), 1, "one that is deleted does not");
}

fn standalone(service: &str) -> Arc<crate::api::v1alpha1::OutboxRelay> {
    fixtures::relay(service, &format!("{{microservice: {service}, placement: Standalone, sink: {{nats: {{}}}}}}"))
}

#[test]
fn a_relay_of_its_own_leaves_the_services_pods_alone() {
    let (mut observed, settings) = (settled(&orders()), settings_with_broker());
    let without = find(&plan(&orders(), &observed, &settings).unwrap(), "Deployment/orders");
    observed.relays = vec![standalone("orders")];
    let plan = plan(&orders(), &observed, &settings).unwrap();
    let with = find(&plan, "Deployment/orders");
    assert_eq!(with["spec"], without["spec"], "its pods do not roll");
    assert!(find(&plan, "NetworkPolicy/orders-relay")["spec"].to_string().contains("9464"));
    insta::assert_yaml_snapshot!(find(&plan, "Deployment/orders-relay"), {".metadata.annotations" => "[annotations]"});
}

#[test]
fn a_relay_of_its_own_stays_until_the_sidecar_runs() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    observed.relay_deployment = Some(ready(1));
    let planned = plan(&orders(), &observed, &settings()).unwrap();
    let has = |plan: &Plan| fixtures::names(plan).contains(&"Deployment/orders-relay".to_owned());
    assert!(has(&planned), "the service's pods have no sidecar yet");
    observed.deployment = Some(Workload { updated: 1, ..live(&planned) });
    assert!(has(&plan(&orders(), &observed, &settings()).unwrap()), "they roll out");
    observed.deployment = Some(live(&planned));
    assert!(!has(&plan(&orders(), &observed, &settings()).unwrap()));
}

#[test]
fn a_secret_of_weft_is_not_mounted_and_the_one_before_stays() {
    let mut observed = settled(&orders());
    let relay = "{microservice: orders, sink: {http: {url: 'http://thief/', secret: customers-db-admin}}}";
    observed.relays = vec![fixtures::relay("orders", relay)];
    observed.kept_secret = Some("gateway".to_owned());
    let deployment = find(&plan(&orders(), &observed, &settings()).unwrap(), "Deployment/orders").to_string();
    assert!(!deployment.contains("customers-db-admin") && deployment.contains("\"gateway\""), "{deployment}");
}

#[test]
fn a_relay_of_its_own_that_cannot_be_read_stays() {
    let mut observed = settled(&orders());
    observed.relays = vec![standalone("orders")];
    let before = plan(&orders(), &observed, &settings_with_broker()).unwrap();
    observed.relay_deployment =
        Some(Workload { annotations: annotations(&before, "Deployment/orders-relay"), ..ready(1) });
    observed.relays = vec![relay_of("younger")];
    observed.kept_relay = Some("orders".to_owned());
    let after = plan(&orders(), &observed, &settings_with_broker()).unwrap();
    assert_eq!(find(&after, "Deployment/orders-relay"), find(&before, "Deployment/orders-relay"));
}

#[test]
fn a_relay_without_a_database_changes_nothing() {
    let gateway = microservice("gateway", STATELESS);
    let with = Observed { relays: vec![relay_of("gateway")], ..Observed::default() };
    assert_eq!(plan(&gateway, &with, &settings()), plan(&gateway, &Observed::default(), &settings()));
}

#[test]
fn what_must_outlive_the_microservice_has_no_owner() {
    let plan = plan(&orders(), &settled(&orders()), &settings()).unwrap();
    for child in plan.children.iter().map(fixtures::value) {
        let owned = child["metadata"].get("ownerReferences").is_some();
        assert_eq!(owned, child["kind"] != "Secret", "{}", child["metadata"]["name"]);
    }
    let retention = &find(&plan, "StatefulSet/orders-db")["spec"]["persistentVolumeClaimRetentionPolicy"];
    assert_eq!(retention["whenDeleted"], "Retain");
}

/// Plans in which every kind of pod is: a service with a sidecar and its server; a relay and an inbox of their own; a set-up.
fn with_every_pod(settings: &Settings) -> Vec<Plan> {
    let mut sidecar = settled(&orders());
    sidecar.relays = vec![relay_of("orders")];
    let mut consumer = orders();
    consumer.spec.consumes = serde_json::from_value(json!([{"from": "stock", "function": "stock.on_moved"}])).unwrap();
    let mut alone = settled(&orders());
    let relay = "{microservice: orders, placement: Standalone, sink: {nats: {servers: ['nats://n:4222']}}}";
    alone.relays = vec![fixtures::relay("orders", relay)];
    let plans: Vec<_> = [(orders(), sidecar), (consumer, alone), (orders(), before_setup())]
        .iter()
        .map(|(object, observed)| plan(object, observed, settings).unwrap())
        .collect();
    let names: Vec<_> = plans.iter().flat_map(fixtures::names).collect();
    for pod in ["Deployment/orders", "StatefulSet/orders-db", "Deployment/orders-relay", "Deployment/orders-inbox"] {
        assert!(names.contains(&pod.to_owned()), "{names:?}");
    }
    assert!(names.iter().any(|name| name.starts_with("Job/")), "{names:?}");
    plans
}

/// Children with pods.
fn with_pods(plan: &Plan) -> Vec<Value> {
    let children = plan.children.iter().map(fixtures::value);
    children.filter(|child| child["spec"]["template"]["spec"].is_object()).collect()
}

#[test]
fn all_pods_keep_to_pod_security_restricted() {
    for child in with_every_pod(&settings()).iter().flat_map(with_pods) {
        fixtures::assert_restricted(&child["spec"]["template"]["spec"]);
    }
}

#[test]
fn names_that_leave_no_room_and_services_that_depend_on_themselves_are_refused() {
    let long = microservice(&"a".repeat(33), STATELESS);
    assert_eq!(plan(&long, &Observed::default(), &settings()).unwrap_err().reason, Reason::NameTooLong);
    let own = microservice("orders", "{image: i, dependsOn: [{service: orders}]}");
    assert_eq!(plan(&own, &Observed::default(), &settings()).unwrap_err().reason, Reason::DependsOnItself);
}

#[test]
fn a_size_that_is_none_is_refused_with_the_field() {
    let object = microservice("orders", "{image: i, database: {postgres: {storage: {size: 1.5Gi}}}}");
    let refused = plan(&object, &Observed::default(), &settings()).unwrap_err();
    assert!(refused.message.starts_with("spec.database.postgres.storage.size: `1.5Gi`"), "{}", refused.message);
}

/// The pods of a chart that is called `orders` too, as the recommended labels have it.
#[test]
fn pods_that_others_label_alike_are_not_selected() {
    let mut observed = settled(&orders());
    observed.relays = vec![relay_of("orders")];
    let plan = plan(&orders(), &observed, &settings()).unwrap();
    let theirs = [("name", "orders"), ("instance", "orders"), ("component", "service"), ("component", "database")]
        .map(|(key, value)| (format!("app.kubernetes.io/{key}"), value));
    for child in plan.children.iter().map(fixtures::value) {
        let spec = &child["spec"];
        let selectors = [&spec["selector"]["matchLabels"], &spec["podSelector"]["matchLabels"], &spec["selector"]];
        for selector in selectors.into_iter().filter_map(|selector| selector.as_object()) {
            let selects = selector.iter().all(|(key, value)| theirs.iter().any(|(k, v)| k == key && v == value));
            assert!(!selects, "{} {}: {selector:?}", child["kind"], child["metadata"]["name"]);
        }
    }
}

mod gate;
mod neighbours;
mod placements;
