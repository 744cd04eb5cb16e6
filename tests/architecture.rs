//! The direction of dependencies between the modules, as the picture in `src/lib.rs` has it.
//!
//! Every `crate::a::…` in `src/` is an arrow from the file's own top module to `a`; the table says which may be.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// What every long-running program may use.
const EVERYDAY: [&str; 5] = ["admin", "metrics", "outage", "shutdown", "telemetry"];

/// Top modules, and which others each may use. A module that is not here fails the test, so that whoever adds one decides.
fn allowed() -> BTreeMap<&'static str, Vec<&'static str>> {
    let with_everyday = |modules: &[&'static str]| modules.iter().copied().chain(EVERYDAY).collect();
    BTreeMap::from([
        ("domain", vec![]),
        ("contract", vec!["domain"]),
        ("api", vec!["domain"]),
        ("postgres", with_everyday(&["contract", "domain", "secret"])),
        ("database", with_everyday(&["contract", "domain", "output", "postgres"])),
        ("dead_letters", vec!["contract", "postgres"]),
        ("reload", vec!["contract"]),
        (
            "relay",
            with_everyday(&["contract", "dead_letters", "domain", "nats", "output", "postgres", "reload", "secret"]),
        ),
        ("inbox", with_everyday(&["contract", "dead_letters", "domain", "nats", "output", "postgres", "reload"])),
        ("saga", with_everyday(&["contract", "domain", "nats", "output", "postgres", "secret"])),
        ("controllers", with_everyday(&["api", "contract", "crds", "domain", "nats", "secret"])),
        ("crds", vec!["api", "output"]),
        ("admin", vec!["metrics", "shutdown"]),
        ("metrics", vec![]),
        ("nats", vec!["contract", "domain", "outage", "secret"]),
        ("outage", vec![]),
        ("output", vec![]),
        ("secret", vec!["outage"]),
        ("shutdown", vec![]),
        ("telemetry", vec![]),
        ("broker", vec!["controllers", "domain", "nats", "output"]),
        ("cli", with_everyday(&["broker", "controllers", "crds", "database", "inbox", "output", "relay", "saga"])),
    ])
}

/// Crates of the control plane; the data plane runs without Kubernetes.
const KUBERNETES: [&str; 3] = ["kube", "k8s_openapi", "schemars"];
const DATA_PLANE: [&str; 11] = [
    "domain",
    "contract",
    "nats",
    "postgres",
    "database",
    "dead_letters",
    "inbox",
    "relay",
    "reload",
    "saga",
    "secret",
];

/// All files of `src/`, with the top module each is of; `lib.rs` and `main.rs` tie everything together and are left out.
fn files() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let first = path.strip_prefix(&root).unwrap().components().next().unwrap();
                let module = Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned();
                if !["lib", "main"].contains(&module.as_str()) {
                    files.push((module, path));
                }
            }
        }
    }
    files
}

/// The code without comments, in one line, so that a `use` over several lines is found whole.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| line.split("//").next().unwrap_or_default().trim()).collect::<Vec<_>>().join(" ")
}

/// The first segments after `root::`, those of a `root::{a::…, b}` among them.
fn first_segments(code: &str, root: &str) -> BTreeSet<String> {
    let start = format!("{root}::");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices(&start) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + start.len()..];
        match rest.strip_prefix('{') {
            None => drop(found.insert(identifier(rest))),
            Some(group) => found.extend(group_members(group)),
        }
    }
    found
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The first segments of a group's members, up to its closing brace.
fn group_members(group: &str) -> BTreeSet<String> {
    let (mut depth, mut member, mut found) = (0, String::new(), BTreeSet::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => drop(found.insert(identifier(std::mem::take(&mut member).trim()))),
            c if depth == 0 => member.push(c),
            _ => {}
        }
    }
    found.insert(identifier(member.trim()));
    found.remove("");
    found
}

#[test]
fn modules_depend_on_each_other_in_one_direction_only() {
    let allowed = allowed();
    let mut wrong = BTreeSet::new();
    for (module, path) in files() {
        let may = allowed.get(module.as_str()).unwrap_or_else(|| panic!("src/{module} is not in this test's table"));
        for used in first_segments(&code(&path), "crate") {
            // a macro or a constant of the crate's root has no module of that name
            if used != module && allowed.contains_key(used.as_str()) && !may.contains(&used.as_str()) {
                wrong.insert(format!("{module} uses {used} in {}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}

/// The parts of the operator, from the ground up: each may use those before it. `fixtures` is for tests.
const OPERATOR: [&str; 11] =
    ["resources", "status", "render", "database", "store", "request", "apply", "runtime", "watch", "kinds", "operator"];

#[test]
fn the_parts_of_the_operator_depend_on_each_other_in_one_direction_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/controllers");
    let rank = |part: &str| OPERATOR.iter().position(|known| *known == part);
    let mut wrong = BTreeSet::new();
    for (_, path) in files().into_iter().filter(|(module, _)| module == "controllers") {
        let inside = path.strip_prefix(&root).unwrap();
        let part = Path::new(inside.components().next().unwrap().as_os_str()).file_stem().unwrap().to_str().unwrap();
        if ["mod", "fixtures"].contains(&part) {
            continue;
        }
        let own = rank(part).unwrap_or_else(|| panic!("src/controllers/{part} is not in this test's list"));
        let code = production(&path);
        let mut used = first_segments(&code, "crate::controllers");
        used.extend(first_segments(&code, "controllers"));
        if inside.components().count() == 1 || inside.ends_with(Path::new(part).join("mod.rs")) {
            used.extend(first_segments(&code, "super"));
        }
        let against = used.iter().filter(|used| rank(used).is_some_and(|used| used > own));
        wrong.extend(against.map(|used| format!("{part} uses {used} in {}", path.display())));
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}

/// The code without its tests, which stand at the end of a file.
fn production(path: &Path) -> String {
    if path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests")) {
        return String::new();
    }
    let code = code(path);
    code.split_once("#[cfg(test)]").map_or(code.clone(), |(production, _)| production.to_owned())
}

#[test]
fn the_table_itself_has_no_cycle() {
    let allowed = allowed();
    let mut left: BTreeSet<_> = allowed.keys().copied().collect();
    while !left.is_empty() {
        let free: Vec<_> =
            left.iter().copied().filter(|module| allowed[module].iter().all(|used| !left.contains(used))).collect();
        assert!(!free.is_empty(), "a cycle among {left:?}");
        left.retain(|module| !free.contains(module));
    }
}

#[test]
fn the_data_plane_never_imports_kubernetes() {
    for (module, path) in files().into_iter().filter(|(module, _)| DATA_PLANE.contains(&module.as_str())) {
        let code = code(&path);
        for name in KUBERNETES {
            assert!(first_segments(&code, name).is_empty(), "{module} uses {name} in {}", path.display());
        }
    }
}

#[test]
fn the_domain_does_no_io() {
    for (_, path) in files().into_iter().filter(|(module, _)| module == "domain") {
        let code = code(&path);
        for name in ["tokio", "reqwest", "async_nats", "tokio_postgres"] {
            assert!(first_segments(&code, name).is_empty(), "{name} in {}", path.display());
        }
    }
}

#[test]
fn segments_are_found_in_every_form_of_use() {
    let code =
        "use crate::{ api::v1::{A, B}, domain::names, postgres }; let x = crate::relay::run(); my_crate::y; kube::Api";
    let found: Vec<_> = first_segments(code, "crate").into_iter().collect();
    assert_eq!(found, ["api", "domain", "postgres", "relay"]);
    assert_eq!(first_segments(code, "kube").into_iter().collect::<Vec<_>>(), ["Api"]);
}
