//! The lint of a saga's expressions: what they refer to, and whether it is known there.

use super::{
    definition::{Call, Definition},
    expression,
    lint::Findings,
    references::References,
    request::wrong_header,
    schema::unknown_member,
    tree::{Kind, NodeId, Order, Tree},
};

/// Where an expression is. This decides which values it can use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Site {
    Do(NodeId),
    Undo(NodeId),
    Compensated,
}

/// The expressions of a call's request.
pub(super) fn check_call(
    definition: &Definition,
    tree: &Tree,
    site: Site,
    call: &Call,
    field: &str,
    findings: &mut Findings,
) {
    let check = Check { definition, tree, site };
    for (name, source) in &call.with {
        check.source(source, &format!("{field}.with.{name}"), findings);
    }
    if let Some(source) = &call.body {
        check.source(source, &format!("{field}.body"), findings);
    }
    for (name, source) in &call.headers {
        let field = format!("{field}.headers.{name}");
        if let Some(why) = wrong_header(name) {
            findings.add(&field, format!("`{name}` {why}"));
        } else if call.headers.keys().any(|other| other < name && other.eq_ignore_ascii_case(name)) {
            findings.add(&field, format!("`{name}` is there twice, since upper case does not matter; remove one"));
        }
        check.source(source, &field, findings);
    }
}

/// An expression that is evaluated when the saga comes to it: `when`, `forEach.items`, `waitUntil`, `output`, `key`.
pub(super) fn check_expression(
    definition: &Definition,
    tree: &Tree,
    node: NodeId,
    source: &str,
    field: &str,
    findings: &mut Findings,
) {
    Check { definition, tree, site: Site::Do(node) }.source(source, field, findings);
}

struct Check<'a> {
    definition: &'a Definition,
    tree: &'a Tree,
    site: Site,
}

impl Check<'_> {
    fn source(&self, source: &str, field: &str, findings: &mut Findings) {
        match expression::parse(source) {
            Ok(program) => self.references(&References::of(&program.expression().expr), field, findings),
            Err(error) => {
                let message = format!("`{}` {error}; see https://cel.dev for the language", excerpt(source));
                findings.add(field, message);
            }
        }
    }

    /// Whether there is an `item`.
    fn in_each(&self) -> bool {
        match self.site {
            Site::Do(node) | Site::Undo(node) => self.tree.node(node).is_some_and(|node| node.each.is_some()),
            Site::Compensated => false,
        }
    }

    fn references<'r>(&self, references: &'r References, field: &str, findings: &mut Findings) {
        let mut reported = Vec::new();
        for name in &references.variables {
            if reported.contains(&name) {
                continue;
            }
            reported.push(name);
            match name.as_str() {
                "input" | "steps" => {}
                "failure" if !matches!(self.site, Site::Do(_)) => {}
                "item" if self.in_each() => {}
                "item" => findings.add(field, "`item` is known only in a step that has a `forEach`, or that is in one; use `input` or `steps` here"),
                "failure" => findings.add(field, "`failure` is known only in `undo` and `onCompensated`; use `input` or `steps` here"),
                _ => findings.add(field, format!("`{name}` is not a variable; there are `input`, `steps.NAME.reply`, in a `forEach` `item` and, when compensating, `failure`{}", self.dash_hint(name))),
            }
        }
        for refusal in references.refusals() {
            findings.add(field, refusal);
        }
        if references.whole_steps {
            findings.add(field, "`steps` is used as a whole; name a step in it: `steps.NAME.reply`");
        }
        let unknown = |path: &'r Vec<String>| Some((path, unknown_member(self.definition.input.as_ref()?, path)?));
        if let Some((path, name)) = references.input.iter().find_map(unknown) {
            let path = path.join(".");
            findings.add(field, format!("`input.{path}` is not in spec.input, which has no property `{name}` there; correct the name, or add it"));
        }
        for reference in &references.steps {
            let guarded = references.steps.iter().any(|other| other.guarded && other.step == reference.step);
            if let Some(message) = self.wrong_step(&reference.step, reference.member.as_deref(), guarded) {
                findings.add(field, message);
            }
        }
    }

    /// What is wrong with a reference to `step`; `guarded` when the expression also contains `has(steps.STEP.reply)`.
    fn wrong_step(&self, step: &str, member: Option<&str>, guarded: bool) -> Option<String> {
        let Some(node) = self.tree.task(step) else {
            let mut names: Vec<String> = Vec::new();
            for (_, node) in self.tree.nodes().filter(|(_, node)| !node.name.is_empty()) {
                let name = format!("`{}`", node.name);
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            return Some(format!("`{step}` is not a step; there are {}{}", names.join(", "), self.dash_hint(step)));
        };
        if member != Some("reply") {
            return Some(format!("a step has a `reply` and nothing else; write `steps[\"{step}\"].reply`"));
        }
        if !matches!(self.tree.kind(node), Some(Kind::Call(_) | Kind::Signal { .. })) {
            return Some(format!(
                "`{step}` has no reply, since it is no call and no signal; use the reply of a step in it"
            ));
        }
        let (Site::Do(here) | Site::Undo(here)) = self.site else {
            return (!guarded).then(|| format!(
                "`{step}` may not have run, and then has no reply; use `input` or `failure`, or test `has(steps[\"{step}\"].reply)` first"
            ));
        };
        self.wrong_place(step, node, here, guarded)
    }

    fn wrong_place(&self, step: &str, node: NodeId, here: NodeId, guarded: bool) -> Option<String> {
        let is_undo = matches!(self.site, Site::Undo(_));
        match self.tree.order(node, here) {
            Order::Before { always: false } if !guarded => Some(format!(
                "`{step}` is not done when its condition is false, and then has no reply; use `input`, or test `has(steps[\"{step}\"].reply)` first"
            )),
            Order::Before { .. } => None,
            Order::Same if is_undo && guarded => None,
            Order::Same if is_undo => Some(format!(
                "`{step}` is also undone when its outcome is unknown, and then has no reply; use `input`, or test `has(steps[\"{step}\"].reply)` first"
            )),
            Order::Beside => Some(format!(
                "`{step}` is done at the same time and its reply may not be there; use `input` or the reply of an earlier step"
            )),
            Order::Instead => Some(format!(
                "`{step}` is done only when this is not, and then has no reply; use `input` or the reply of an earlier step"
            )),
            Order::After if is_undo => Some(format!(
                "the reply of the later step `{step}` is not there when it never ran; use `input` or the reply of an earlier step"
            )),
            Order::Same | Order::After => {
                Some(format!("the reply of `{step}` is not there yet; use `input` or the reply of an earlier step"))
            }
        }
    }

    /// `steps.reserve-credit.reply` is a subtraction in CEL: a hint, when a step's name begins or ends with `name`.
    fn dash_hint(&self, name: &str) -> String {
        let mut names = self.tree.nodes().map(|(_, node)| node.name.as_str());
        let step = names.find(|step| step.split('-').any(|part| part == name) && step.contains('-'));
        step.map_or_else(String::new, |step| format!(" (a name with a dash is written `steps[\"{step}\"].reply`)"))
    }
}

fn excerpt(source: &str) -> String {
    const LONGEST: usize = 80;
    if source.chars().count() <= LONGEST {
        source.to_owned()
    } else {
        format!("{}…", source.chars().take(LONGEST).collect::<String>())
    }
}
