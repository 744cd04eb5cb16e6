//! What an expression refers to: walks the CEL tree for the lint, with the scopes of macros.

use std::collections::BTreeSet;

use cel::common::ast::{CallExpr, EntryExpr, Expr, LiteralValue};

/// Functions that `with` may call, besides operators and the macros `has`, `all`, `exists`, `exists_one`, `map`, `filter`.
pub(super) const FUNCTIONS: &[&str] =
    &["size", "contains", "startsWith", "endsWith", "string", "int", "uint", "double", "max", "min"];

/// All references of an expression, in the order of the text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct References {
    /// Variables that no macro declares.
    pub variables: Vec<String>,
    pub functions: Vec<String>,
    /// References `steps.NAME…`.
    pub steps: Vec<StepReference>,
    /// References `input.…`, without `input`.
    pub input: Vec<Vec<String>>,
    /// Whether `steps` is used as a whole, or indexed by something that is not a literal.
    pub whole_steps: bool,
    /// One sentence for each construct that the language has, but that panics in the interpreter or has no JSON form.
    pub unsupported: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StepReference {
    pub step: String,
    /// The first member after the step's name. Only `reply` is valid.
    pub member: Option<String>,
    /// Whether the reference is inside `has(…)`.
    pub guarded: bool,
}

impl References {
    pub(super) fn of(expression: &Expr) -> Self {
        let mut found = Self::default();
        found.walk(expression, &mut Vec::new());
        found
    }

    /// Reasons why the expression must not be evaluated at all.
    pub(super) fn refusals(&self) -> Vec<String> {
        let unknown: BTreeSet<_> = self.functions.iter().filter(|name| !FUNCTIONS.contains(&name.as_str())).collect();
        let unknown =
            unknown.into_iter().map(|name| format!("`{name}` is not a function; there are {}", FUNCTIONS.join(", ")));
        unknown.chain(self.unsupported.iter().take(1).cloned()).collect()
    }

    fn walk<'e>(&mut self, expression: &'e Expr, declared: &mut Vec<&'e str>) {
        if self.path(expression, declared) {
            return;
        }
        match expression {
            Expr::Literal(LiteralValue::Bytes(_)) => {
                self.unsupported.push("bytes have no JSON form; write a string: `\"…\"` without the `b`".to_owned());
            }
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => self.variable(name, declared),
            Expr::Select(select) => self.walk(&select.operand.expr, declared),
            Expr::Call(call) => self.call(call, declared),
            Expr::List(list) => list.elements.iter().for_each(|element| self.walk(&element.expr, declared)),
            Expr::Map(map) => map.entries.iter().for_each(|entry| self.entry(&entry.expr, declared)),
            Expr::Struct(structure) => {
                let name = &structure.type_name;
                self.unsupported
                    .push(format!("`{name}{{…}}` makes a message and there are none; write a map: `{{\"…\": …}}`"));
                structure.entries.iter().for_each(|entry| self.entry(&entry.expr, declared));
            }
            Expr::Comprehension(loop_) => {
                self.walk(&loop_.iter_range.expr, declared);
                self.walk(&loop_.accu_init.expr, declared);
                let outside = declared.len();
                declared.push(&loop_.iter_var);
                declared.extend(loop_.iter_var2.as_deref());
                declared.push(&loop_.accu_var);
                for part in [&loop_.loop_cond, &loop_.loop_step, &loop_.result] {
                    self.walk(&part.expr, declared);
                }
                declared.truncate(outside);
            }
        }
    }

    fn call<'e>(&mut self, call: &'e CallExpr, declared: &mut Vec<&'e str>) {
        if call.func_name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            self.functions.push(call.func_name.clone());
        }
        if let Some(target) = &call.target {
            self.walk(&target.expr, declared);
        }
        call.args.iter().for_each(|argument| self.walk(&argument.expr, declared));
    }

    fn entry<'e>(&mut self, entry: &'e EntryExpr, declared: &mut Vec<&'e str>) {
        match entry {
            EntryExpr::StructField(field) => self.walk(&field.value.expr, declared),
            EntryExpr::MapEntry(entry) => {
                self.walk(&entry.key.expr, declared);
                self.walk(&entry.value.expr, declared);
            }
        }
    }

    fn variable(&mut self, name: &str, declared: &[&str]) {
        if !name.starts_with('@') && !declared.contains(&name) {
            self.whole_steps |= name == "steps";
            self.variables.push(name.to_owned());
        }
    }

    /// Records `steps.NAME…` as one reference; returns `false` for anything else.
    fn path(&mut self, expression: &Expr, declared: &[&str]) -> bool {
        let (names, guarded) = match expression {
            Expr::Select(select) if select.test => match chain(&select.operand.expr) {
                Some(mut names) => {
                    names.push(&select.field);
                    (names, true)
                }
                None => return false,
            },
            other => match chain(other) {
                Some(names) => (names, false),
                None => return false,
            },
        };
        if let ["input", rest @ ..] = names.as_slice()
            && !declared.contains(&"input")
        {
            self.variables.push("input".to_owned());
            self.input.push(rest.iter().map(|name| (*name).to_owned()).collect());
            return true;
        }
        let ["steps", step, rest @ ..] = names.as_slice() else { return false };
        if declared.contains(&"steps") {
            return false;
        }
        self.variables.push("steps".to_owned());
        let member = rest.first().map(|name| (*name).to_owned());
        self.steps.push(StepReference { step: (*step).to_owned(), member, guarded });
        true
    }
}

/// The nesting depth of operations.
pub(super) fn depth(expression: &Expr) -> usize {
    fn entry(entry: &EntryExpr) -> usize {
        match entry {
            EntryExpr::StructField(field) => depth(&field.value.expr),
            EntryExpr::MapEntry(entry) => depth(&entry.key.expr).max(depth(&entry.value.expr)),
        }
    }
    let deepest = match expression {
        Expr::Unspecified | Expr::Literal(_) | Expr::Ident(_) => 0,
        Expr::Select(select) => depth(&select.operand.expr),
        Expr::Call(call) => {
            call.target.iter().map(AsRef::as_ref).chain(&call.args).map(|e| depth(&e.expr)).max().unwrap_or(0)
        }
        Expr::List(list) => list.elements.iter().map(|element| depth(&element.expr)).max().unwrap_or(0),
        Expr::Map(map) => map.entries.iter().map(|e| entry(&e.expr)).max().unwrap_or(0),
        Expr::Struct(structure) => structure.entries.iter().map(|e| entry(&e.expr)).max().unwrap_or(0),
        Expr::Comprehension(comprehension) => {
            let cel::common::ast::ComprehensionExpr { iter_range, accu_init, loop_cond, loop_step, result, .. } =
                comprehension.as_ref();
            [iter_range, accu_init, loop_cond, loop_step, result]
                .map(|part| depth(&part.expr))
                .into_iter()
                .max()
                .unwrap_or(0)
        }
    };
    deepest + 1
}

fn chain(expression: &Expr) -> Option<Vec<&str>> {
    match expression {
        Expr::Ident(name) => Some(vec![name]),
        Expr::Select(select) if !select.test => {
            let mut names = chain(&select.operand.expr)?;
            names.push(&select.field);
            Some(names)
        }
        Expr::Call(call) if call.func_name == "_[_]" => {
            let [operand, index] = call.args.as_slice() else { return None };
            let Expr::Literal(LiteralValue::String(key)) = &index.expr else { return None };
            let mut names = chain(&operand.expr)?;
            names.push(key.inner());
            Some(names)
        }
        _ => None,
    }
}
