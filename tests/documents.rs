//! What the documents and the generated chart say is so: metrics, links, targets of make, reasons, definitions.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use weft::controllers::resources::{reason::Reason, settings::Resources};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The words of `text` that begin with `prefix`, made of lower case letters and `_`.
fn words(text: &str, prefix: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'))
        .filter(|word| word.starts_with(prefix))
        .map(str::to_owned)
        .collect()
}

/// Without what `prometheus-client` appends.
fn stem(metric: &str) -> String {
    let stem = metric.strip_suffix("_total").unwrap_or(metric);
    stem.strip_suffix("_seconds").unwrap_or(stem).to_owned()
}

fn documents() -> Vec<PathBuf> {
    let folders = [".", "docs", "charts/weft", "charts/weft-crds", "tests/e2e/cluster"];
    let mut documents: Vec<_> = folders
        .iter()
        .flat_map(|folder| fs::read_dir(root().join(folder)).expect("the folder is there"))
        .map(|entry| entry.expect("the folder is readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    documents.sort();
    documents
}

/// Targets of `[text](target)`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// GitHub's anchors of a document's headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    headings
        .map(|heading| {
            let kept = heading.to_lowercase().replace(' ', "-");
            kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
        })
        .collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let stems = |text: &str| words(text, "weft_").iter().map(|word| stem(word)).collect::<BTreeSet<_>>();
    let (code, documented) = (stems(&read("src/metrics.rs")), stems(&read("docs/metrics.md")));
    assert_eq!(code.difference(&documented).collect::<Vec<_>>(), Vec::<&String>::new(), "missing in docs/metrics.md");
    assert_eq!(documented.difference(&code).collect::<Vec<_>>(), Vec::<&String>::new(), "not in src/metrics.rs");
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        let text = read(&document);
        for link in links(&text).filter(|link| !link.starts_with("http")) {
            let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            let folder = document.parent().expect("a document is in a folder");
            let target = if path.is_empty() { document.clone() } else { folder.join(path) };
            let found = match anchor {
                None => target.exists(),
                Some(anchor) => fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor)),
            };
            if !found {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert_eq!(broken, Vec::<String>::new());
}

#[test]
fn every_target_of_make_that_a_document_names_exists() {
    let makefile = read("Makefile");
    let targets: BTreeSet<_> =
        makefile.lines().filter_map(|line| line.split_once(": ")).map(|(name, _)| name).collect();
    for document in documents() {
        for rest in read(&document).split("`make ").skip(1) {
            let words = rest.split('`').next().unwrap_or_default().split(' ').filter(|word| !word.contains('='));
            for word in words {
                assert!(targets.contains(word), "{}: there is no target `make {word}`", document.display());
            }
        }
    }
}

/// The text of every Rust file below `folder`.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("the folder is readable").path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &read(&path);
        }
    }
    text
}

#[test]
fn every_reason_that_the_runbook_explains_exists() {
    let runbook = read("docs/runbook.md");
    let (_, table) = runbook.split_once("\n| reason |").expect("the runbook has its table of reasons");
    let cells = table.lines().skip(2).filter_map(|row| row.strip_prefix("| ")?.split_once(" | ").map(|(cell, _)| cell));
    let mut reasons = cells.flat_map(|cell| cell.split(", ")).map(|reason| reason.trim_matches('`')).peekable();
    assert!(reasons.peek().is_some(), "the table has rows");
    let unknown: Vec<_> = reasons.filter(|reason| Reason::parse(reason).is_none()).collect();
    assert_eq!(unknown, Vec::<&str>::new(), "no condition, event or problem has these reasons");
}

#[test]
fn every_reason_is_that_of_something() {
    let code = sources(&root().join("src"));
    let unused: Vec<_> = Reason::all().filter(|reason| !code.contains(&format!("Reason::{reason}"))).collect();
    assert_eq!(unused, Vec::<Reason>::new());
}

#[test]
fn every_reason_that_is_not_calm_is_in_the_runbook() {
    let runbook = read("docs/runbook.md");
    let silent: Vec<_> =
        Reason::all().filter(|reason| !reason.is_calm() && !runbook.contains(&format!("`{reason}`"))).collect();
    assert_eq!(silent, Vec::<Reason>::new(), "not in the table of docs/runbook.md");
}

#[test]
fn every_claim_about_security_ends_with_tests_that_exist() {
    let text = read("docs/security.md");
    let (claims, _) = text.split_once("\n## What it does not hold").expect("what is not held comes last");
    let paragraphs = claims.split("\n\n").flat_map(|paragraph| paragraph.split("\n- "));
    let items: Vec<_> = paragraphs.filter(|item| item.trim_end().ends_with(']')).collect();
    let bullets = claims.lines().filter(|line| line.starts_with("- ")).count();
    assert_eq!(items.len(), bullets, "a claim is an item of a list and ends with its tests in square brackets");
    let code = sources(&root().join("src")) + &sources(&root().join("tests"));
    for item in items {
        let (_, tests) = item.trim_end_matches([']', '\n']).rsplit_once('[').expect("they begin with a bracket");
        for test in tests.split(',').map(str::trim) {
            let exists = if Path::new(test).extension().is_some_and(|extension| extension == "yaml") {
                ["weft", "weft-crds"]
                    .iter()
                    .any(|chart| root().join("charts").join(chart).join("tests").join(test).exists())
            } else {
                root().join(test).exists() || code.contains(&format!("fn {test}("))
            };
            assert!(exists, "docs/security.md names a test that does not exist: {test}");
        }
    }
}

#[test]
fn the_chart_has_the_definitions_as_they_are() {
    for entry in fs::read_dir(root().join("crds")).expect("the folder is there") {
        let path = entry.expect("the folder is readable").path();
        let name = path.file_name().expect("a file has a name");
        let definition = read(&path);
        let (_, definition) = definition.split_once('\n').expect("its first line says that it is generated");
        let template = read(Path::new("charts/weft-crds/templates").join(name));
        let (_, template) = template.split_once('\n').expect("its first line says that it is generated");
        let kept = template.replacen("  annotations:\n    helm.sh/resource-policy: keep\n", "", 1);
        assert!(kept == definition, "charts/weft-crds is behind crds/{}: run `make crds`", name.display());
        assert_ne!(kept, template, "{}: uninstalling the chart would delete the definition", name.display());
    }
}

/// The chart hands its own on; an operator that is started in another way has those of the code.
#[test]
fn the_chart_has_the_default_resources_of_the_operator() {
    let values: serde_yaml::Value = serde_yaml::from_str(&read("charts/weft/values.yaml")).unwrap();
    let of = |component: &str| serde_yaml::from_value(values[component]["resources"].clone()).unwrap();
    let charts = Resources {
        database: of("database"),
        orchestrator: of("orchestrator"),
        relay: of("relay"),
        setup: of("setup"),
    };
    assert_eq!(charts, Resources::default());
}
