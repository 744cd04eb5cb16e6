//! Expressions that cannot run away: the tree is rewritten, so that each operation is charged for the size of its result.
//!
//! The interpreter cannot be interrupted, and a few characters are enough to keep it busy for hours
//! (`input.l.filter(x, input.l.exists(y, y == x))` over a long list) or to fill the memory (`[s].map(a, a + a).map(…)`). So
//! every node that may give something large is wrapped into a call of [`CHARGE`], which ends the evaluation when the budget is
//! used up. That bounds time and memory at once, since the interpreter copies what it evaluates, and each iteration is charged.
//! It depends on nothing but the values, so a repetition ends alike. Kubernetes bounds its CEL likewise, by a cost limit for each
//! evaluation (KEP-2876).

use std::{cell::Cell, sync::Arc};

use cel::{
    ExecutionError, Value as Cel,
    common::ast::{CallExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr},
    objects::Key,
};

use super::expression::as_path;

/// Units of one evaluation: a unit is a scalar, an item or a member, or 16 bytes of a string, each time that an operation gives
/// it. Enough to map a list of 500 small objects, which the interpreter copies as often.
pub(super) const BUDGET: usize = 1_000_000;

/// The function that charges. Its name cannot be written in an expression.
pub(super) const CHARGE: &str = "@charge";

/// The operators whose results may be as large as what they are given, again and again.
const COPIES: [&str; 2] = ["_+_", "_[_]"];

/// Variables of a metered tree begin with it; the rest is their place in [`Metered::paths`].
const VARIABLE: char = '@';

/// A tree that is charged, with its variables: the paths, such as `input.customer.id`, that it reads.
#[derive(Debug)]
pub(super) struct Metered {
    pub(super) expression: IdedExpr,
    pub(super) paths: Vec<Vec<String>>,
    /// Whether it has a macro, by which it may take long.
    pub(super) loops: bool,
}

impl Metered {
    pub(super) fn of(expression: &IdedExpr) -> Self {
        let mut meter = Meter::default();
        let expression = meter.node(expression);
        Self { expression, paths: meter.paths, loops: meter.loops }
    }

    /// The path of a variable.
    pub(super) fn path(&self, variable: &str) -> Option<&[String]> {
        self.paths.get(variable.strip_prefix(VARIABLE)?.parse::<usize>().ok()?).map(Vec::as_slice)
    }
}

pub(super) fn variable(place: usize) -> String {
    format!("{VARIABLE}{place}")
}

thread_local! {
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

/// Charges for a copy of `value`; false when the budget is used up.
pub(super) fn spend(value: &serde_json::Value) -> bool {
    use serde_json::Value;
    match value {
        Value::String(value) => take(text(value.len())),
        Value::Array(items) => items.iter().all(spend) && take(1),
        Value::Object(members) => members.iter().all(|(name, value)| take(text(name.len())) && spend(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => take(1),
    }
}

/// The cost of a string of `length` bytes.
fn text(length: usize) -> usize {
    1 + length / 16
}

fn take(cost: usize) -> bool {
    LEFT.set(LEFT.get().saturating_sub(cost));
    !is_used_up()
}

/// Begins an evaluation in this thread.
pub(super) fn begin() {
    LEFT.set(BUDGET);
}

/// Whether the evaluation in this thread has used up its budget.
pub(super) fn is_used_up() -> bool {
    LEFT.get() == 0
}

/// The function [`CHARGE`].
pub(super) fn charge(value: Cel) -> Result<Cel, ExecutionError> {
    if take(size(&value)) { Ok(value) } else { Err(ExecutionError::function_error(CHARGE, "")) }
}

fn size(value: &Cel) -> usize {
    match value {
        Cel::List(items) => 1 + items.iter().map(size).sum::<usize>(),
        Cel::Map(members) => {
            let key = |key: &Key| if let Key::String(name) = key { text(name.len()) } else { 1 };
            1 + members.map.iter().map(|(name, value)| key(name) + size(value)).sum::<usize>()
        }
        Cel::String(value) => text(value.len()),
        Cel::Bytes(value) => text(value.len()),
        _ => 1,
    }
}

#[derive(Default)]
struct Meter {
    paths: Vec<Vec<String>>,
    /// Variables of the macros around.
    declared: Vec<String>,
    /// The variable in which the innermost macro accumulates its result.
    accumulator: String,
    loops: bool,
}

impl Meter {
    fn node(&mut self, node: &IdedExpr) -> IdedExpr {
        if let Some(path) = as_path(&node.expr).filter(|path| self.is_value(path)) {
            let known = self.paths.iter().position(|known| *known == path);
            let place = known.unwrap_or_else(|| {
                self.paths.push(path);
                self.paths.len() - 1
            });
            return charged(IdedExpr { id: node.id, expr: Expr::Ident(variable(place)) });
        }
        let expr = match &node.expr {
            Expr::Literal(_) | Expr::Unspecified => return node.clone(),
            Expr::Ident(name) if *name == self.accumulator => return node.clone(),
            Expr::Ident(name) => Expr::Ident(name.clone()),
            Expr::Select(select) => {
                let mut select = select.clone();
                *select.operand = self.node(&select.operand);
                Expr::Select(select)
            }
            Expr::Call(call) if COPIES.contains(&call.func_name.as_str()) && !self.accumulates(call) => {
                Expr::Call(self.call(call))
            }
            // its result is no larger than its arguments, which are charged
            Expr::Call(call) => return IdedExpr { id: node.id, expr: Expr::Call(self.call(call)) },
            Expr::List(list) => {
                let mut list = list.clone();
                list.elements = list.elements.iter().map(|element| self.node(element)).collect();
                Expr::List(list)
            }
            Expr::Map(map) => {
                let mut map = map.clone();
                map.entries.iter_mut().for_each(|entry| self.entry(entry));
                Expr::Map(map)
            }
            Expr::Struct(structure) => Expr::Struct(structure.clone()),
            Expr::Comprehension(comprehension) => {
                self.loops = true;
                let mut own = comprehension.clone();
                own.iter_range = self.node(&own.iter_range);
                own.accu_init = self.node(&own.accu_init);
                let outside = self.declared.len();
                self.declared.push(own.iter_var.clone());
                self.declared.extend(own.iter_var2.clone());
                self.declared.push(own.accu_var.clone());
                let accumulator = std::mem::replace(&mut self.accumulator, own.accu_var.clone());
                own.loop_cond = self.node(&own.loop_cond);
                // charged as a whole: the interpreter copies what is accumulated in each iteration
                own.loop_step = charged(self.node(&own.loop_step));
                own.result = self.node(&own.result);
                self.accumulator = accumulator;
                self.declared.truncate(outside);
                Expr::Comprehension(own)
            }
        };
        charged(IdedExpr { id: node.id, expr })
    }

    /// Whether a path begins with a variable of the scope.
    fn is_value(&self, path: &[String]) -> bool {
        let root = path.first().map_or("", String::as_str);
        ["input", "steps", "item", "failure"].contains(&root) && !self.declared.iter().any(|declared| declared == root)
    }

    /// Whether it adds to what the macro around accumulates.
    fn accumulates(&self, call: &CallExpr) -> bool {
        call.args.first().is_some_and(|first| matches!(&first.expr, Expr::Ident(name) if *name == self.accumulator))
    }

    fn call(&mut self, call: &CallExpr) -> CallExpr {
        let target = call.target.as_ref().map(|target| Box::new(self.node(target)));
        let args = call.args.iter().map(|argument| self.node(argument)).collect();
        CallExpr { func_name: call.func_name.clone(), target, args }
    }

    fn entry(&mut self, entry: &mut IdedEntryExpr) {
        match &mut entry.expr {
            EntryExpr::StructField(field) => field.value = self.node(&field.value),
            EntryExpr::MapEntry(entry) => {
                entry.key = self.node(&entry.key);
                entry.value = self.node(&entry.value);
            }
        }
    }
}

fn charged(node: IdedExpr) -> IdedExpr {
    let id = node.id;
    IdedExpr { id, expr: Expr::Call(CallExpr { func_name: CHARGE.to_owned(), target: None, args: vec![node] }) }
}

pub(super) fn too_many() -> String {
    format!("it takes more than {BUDGET} steps on these values; leave what needs so many to the service, or send less")
}

/// What an error of the interpreter is about, without any value: those must not get into logs, status and history.
pub(super) fn sentence(error: &ExecutionError, metered: &Metered) -> String {
    use ExecutionError as E;
    if is_used_up() {
        return too_many();
    }
    let of = Cel::type_of;
    match error {
        E::UndeclaredReference(name) => match metered.path(name) {
            Some(path) => format!("there is no `{}`", path.join(".")),
            None => format!("there is no `{name}`"),
        },
        E::NoSuchKey(_) => "a member that it reads is absent".to_owned(),
        E::UnexpectedType { got, want } => format!("a value is of type {got}, and not {want}"),
        E::ValuesNotComparable(a, b) => format!("{} and {} cannot be compared", of(a), of(b)),
        E::UnsupportedUnaryOperator(operator, value) => format!("`{operator}` of {} is not defined", of(value)),
        E::UnsupportedBinaryOperator(operator, a, b) => {
            format!("`{operator}` of {} and {} is not defined", of(a), of(b))
        }
        E::UnsupportedTargetType { target } => format!("a function of {} is not defined", of(target)),
        E::NotSupportedAsMethod { method, target } => format!("`{method}` of {} is not defined", of(target)),
        E::UnsupportedKeyType(value) | E::UnsupportedMapIndex(value) | E::UnsupportedListIndex(value) => {
            format!("{} is no key or index", of(value))
        }
        E::UnsupportedIndex(index, of_what) => format!("{} is no index of {}", of(index), of(of_what)),
        E::FunctionError { function, .. } => format!("`{function}` fails for the value that it is given"),
        E::DivisionByZero(_) | E::RemainderByZero(_) => "it divides by zero".to_owned(),
        E::Overflow(operator, ..) => format!("`{operator}` overflows"),
        E::IndexOutOfBounds(_) => "an index is beyond the end of its list".to_owned(),
        _ => "an operation is not defined for the types of its values".to_owned(),
    }
}

/// The value of a variable for the interpreter.
pub(super) fn to_cel(value: &serde_json::Value) -> Cel {
    use serde_json::Value;
    match value {
        Value::Null => Cel::Null,
        Value::Bool(value) => Cel::Bool(*value),
        Value::Number(number) => match number.as_i64() {
            Some(integer) => Cel::Int(integer),
            None => Cel::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Cel::String(Arc::new(text.clone())),
        Value::Array(items) => Cel::List(Arc::new(items.iter().map(to_cel).collect())),
        Value::Object(members) => {
            let member = |(key, value): (&String, &Value)| (Key::String(Arc::new(key.clone())), to_cel(value));
            Cel::Map(cel::objects::Map { map: Arc::new(members.iter().map(member).collect()) })
        }
    }
}
