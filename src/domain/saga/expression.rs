//! CEL expressions: compiled once for each definition version, evaluated for each call.
//!
//! Variables: `input`, `steps.NAME.reply` (of the steps that succeeded), and while compensating `failure` with its members
//! `step`, `code`, `reason`, `message`; in a `forEach` its `item`. A step whose name holds a dash is written `steps["reserve-credit"].reply`.
//! Integers of the JSON are CEL `int`s, other numbers are `double`s.

use std::borrow::Cow;

use cel::{
    Context, Program,
    common::ast::{Expr, LiteralValue},
};
use serde_json::Value;

use super::{
    meter::{self, Metered},
    references::{self, References},
    request::MAX_BODY,
};

/// A longer expression is refused: it is code, and code belongs in a service.
pub const MAX_LENGTH: usize = 1_000;

/// Maximum nesting depth of the tree: the interpreter needs about 40 kB of stack for each level, and as much for what charges it.
const MAX_DEPTH: usize = 32;
/// Stack that the threads need in which expressions are evaluated.
pub const EVALUATION_STACK: usize = 8 * 1024 * 1024;
/// An expression with more brackets and conditionals than this is parsed on a thread with a large stack, since the
/// parser needs up to 200 kB of stack for each nested one: a few hundred brackets would overflow the caller's stack and
/// end the process.
const MAX_BRACKETS_INLINE: usize = 8;
/// Size of that stack. Pages that are not touched cost nothing.
const STACK: usize = 128 * 1024 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    #[error("is not a CEL expression: {0}")]
    Parse(String),
    #[error("has {0} characters; at most {MAX_LENGTH} are allowed")]
    TooLong(usize),
    #[error("is nested too deeply; at most {MAX_DEPTH} operations may be within each other")]
    TooDeep,
    #[error("is not allowed: {0}")]
    Refused(String),
    #[error("cannot be evaluated: {0}")]
    Evaluate(String),
    #[error("{0} makes the request longer than {MAX_BODY} bytes")]
    BodyTooLong(String),
    /// What it is, and why it cannot be sent where the command wants it.
    #[error("{0}")]
    Unsendable(String),
}

/// The values of the variables in one evaluation.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    pub input: &'a Value,
    /// `{NAME: {"reply": …}}`; a step without a reply is `{}`, so that `has(steps.NAME.reply)` works.
    pub steps: &'a Value,
    /// The item of a `forEach`, in one.
    pub item: Option<&'a Value>,
    /// `None` while the saga is not compensating.
    pub failure: Option<&'a Value>,
}

impl<'a> Scope<'a> {
    fn root(&self, name: &str) -> Option<&'a Value> {
        match name {
            "input" => Some(self.input),
            "steps" => Some(self.steps),
            "item" => self.item,
            "failure" => self.failure,
            _ => None,
        }
    }
}

/// A compiled expression.
#[derive(Debug)]
pub struct Expression(Form);

#[derive(Debug)]
enum Form {
    /// `input.a.b`, `steps["x"].reply.y`: most expressions are only a path, which needs no interpreter.
    Path(Vec<String>),
    Constant(Value),
    Program(Metered),
}

impl Expression {
    pub fn compile(source: &str) -> Result<Self, ExpressionError> {
        let program = parse(source)?;
        // the lint refuses it earlier, but a definition that was stored by an older version must not end the process
        if let Some(refusal) = References::of(&program.expression().expr).refusals().into_iter().next() {
            return Err(ExpressionError::Refused(refusal));
        }
        let form = if let Some(path) = as_path(&program.expression().expr) {
            Form::Path(path)
        } else if let Some(constant) = as_constant(&program.expression().expr) {
            Form::Constant(constant)
        } else {
            Form::Program(Metered::of(program.expression()))
        };
        Ok(Self(form))
    }

    /// Evaluates it with a budget of its own.
    pub fn evaluate(&self, scope: Scope<'_>) -> Result<Value, ExpressionError> {
        meter::begin();
        self.find(scope).map(Cow::into_owned)
    }

    /// Within what is left of the budget.
    pub(super) fn find<'v>(&'v self, scope: Scope<'v>) -> Result<Cow<'v, Value>, ExpressionError> {
        match &self.0 {
            Form::Constant(value) => Ok(Cow::Borrowed(value)),
            Form::Path(path) => follow(path, scope).map(Cow::Borrowed),
            Form::Program(program) => interpret(program, scope).map(Cow::Owned),
        }
    }

    fn paths(&self) -> &[Vec<String>] {
        match &self.0 {
            Form::Path(path) => std::slice::from_ref(path),
            Form::Constant(_) => &[],
            Form::Program(program) => program.paths.as_slice(),
        }
    }

    /// The names of the steps whose replies it reads, guarded or not.
    pub fn steps(&self) -> impl Iterator<Item = &str> {
        self.paths().iter().filter_map(|path| match path.as_slice() {
            [root, step, ..] if root == "steps" => Some(step.as_str()),
            _ => None,
        })
    }

    /// Whether it reads the item of a `forEach`.
    pub fn reads_item(&self) -> bool {
        self.paths().iter().any(|path| path.first().is_some_and(|root| root == "item"))
    }

    /// Whether it may take long on large values.
    pub fn is_heavy(&self) -> bool {
        matches!(&self.0, Form::Program(program) if program.loops)
    }
}

pub(super) fn parse(source: &str) -> Result<Program, ExpressionError> {
    let length = source.chars().count();
    if length > MAX_LENGTH {
        return Err(ExpressionError::TooLong(length));
    }
    let brackets = source.bytes().filter(|byte| b"([{?".contains(byte)).count();
    if brackets <= MAX_BRACKETS_INLINE {
        return parse_here(source);
    }
    std::thread::scope(|scope| {
        let parsing = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || parse_here(source));
        let parsing = parsing
            .map_err(|error| ExpressionError::Parse(format!("there is not enough memory to parse it: {error}")))?;
        // beyond a nesting depth of a hundred the parser miscounts, which is a panic in builds with overflow checks
        parsing.join().unwrap_or(Err(ExpressionError::TooDeep))
    })
}

fn parse_here(source: &str) -> Result<Program, ExpressionError> {
    let program = Program::compile(source).map_err(|errors| {
        let first = errors.errors.first().map_or_else(String::new, |error| {
            format!("{} at line {} column {}", one_line(&error.msg), error.pos.0, error.pos.1)
        });
        ExpressionError::Parse(first)
    })?;
    if references::depth(&program.expression().expr) > MAX_DEPTH {
        return Err(ExpressionError::TooDeep);
    }
    Ok(program)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The names of a chain of selections that starts with a variable; `None` for anything else.
pub(super) fn as_path(expression: &Expr) -> Option<Vec<String>> {
    match expression {
        Expr::Ident(name) => Some(vec![name.clone()]),
        Expr::Select(select) if !select.test => {
            let mut path = as_path(&select.operand.expr)?;
            path.push(select.field.clone());
            Some(path)
        }
        Expr::Call(call) if call.func_name == "_[_]" => {
            let [operand, index] = call.args.as_slice() else { return None };
            let Expr::Literal(LiteralValue::String(key)) = &index.expr else { return None };
            let mut path = as_path(&operand.expr)?;
            path.push(key.inner().to_owned());
            Some(path)
        }
        _ => None,
    }
}

fn as_constant(expression: &Expr) -> Option<Value> {
    let Expr::Literal(literal) = expression else { return None };
    match literal {
        LiteralValue::Boolean(value) => Some(Value::Bool(*value.inner())),
        LiteralValue::Int(value) => Some(Value::from(*value.inner())),
        LiteralValue::Double(value) => Some(Value::from(*value.inner())),
        LiteralValue::String(value) => Some(Value::String(value.inner().to_owned())),
        LiteralValue::Null => Some(Value::Null),
        LiteralValue::Bytes(_) | LiteralValue::UInt(_) => None,
    }
}

fn follow<'v>(path: &[String], scope: Scope<'v>) -> Result<&'v Value, ExpressionError> {
    let mut names = path.iter();
    let root = names.next().map_or("", String::as_str);
    let mut value =
        scope.root(root).ok_or_else(|| ExpressionError::Evaluate(format!("there is no variable `{root}` here")))?;
    for name in names {
        value = value
            .as_object()
            .and_then(|members| members.get(name))
            .ok_or_else(|| ExpressionError::Evaluate(format!("`{}` has no `{name}`", path.join("."))))?;
    }
    Ok(value)
}

thread_local! {
    // the standard functions are many boxed closures: allocated once for each thread, not once for each call
    static FUNCTIONS: Context<'static> = {
        let mut functions = Context::default();
        functions.add_function(meter::CHARGE, meter::charge);
        functions
    };
}

fn interpret(metered: &Metered, scope: Scope<'_>) -> Result<Value, ExpressionError> {
    FUNCTIONS.with(|functions| {
        let mut context = functions.new_inner_scope();
        for (place, path) in metered.paths.iter().enumerate() {
            // what is absent is an error only where it is needed
            if let Ok(value) = follow(path, scope) {
                // it is copied whether or not it is needed
                if !meter::spend(value) {
                    return Err(ExpressionError::Evaluate(meter::too_many()));
                }
                context.add_variable_from_value(meter::variable(place), meter::to_cel(value));
            }
        }
        let value = context.resolve(&metered.expression);
        let value = value.map_err(|error| ExpressionError::Evaluate(meter::sentence(&error, metered)))?;
        value.json().map_err(|_| ExpressionError::Evaluate("the result has no JSON form".to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn evaluate(source: &str) -> Result<Value, ExpressionError> {
        let input = json!({"total": 120, "rate": 0.5, "customer": {"id": "c-1"}, "lines": [{"n": 1}, {"n": 2}]});
        let steps = json!({"reserve-credit": {"reply": {"reservation": 7}}, "approve": {}});
        let failure = json!({"step": "approve", "code": "X", "reason": "NO", "message": "m"});
        Expression::compile(source)?.evaluate(Scope {
            input: &input,
            steps: &steps,
            item: None,
            failure: Some(&failure),
        })
    }

    #[test]
    fn paths_constants_and_arithmetic_evaluate() {
        for (source, value) in [
            ("input.customer.id", json!("c-1")),
            ("input.customer", json!({"id": "c-1"})),
            (r#"steps["reserve-credit"].reply.reservation"#, json!(7)),
            ("failure.reason", json!("NO")),
            ("'text'", json!("text")),
            ("3", json!(3)),
            ("input.total * 2 + 1", json!(241)),
            ("double(input.total) * input.rate", json!(60.0)),
            ("input.total > 100 ? 'big' : 'small'", json!("big")),
            ("has(steps.approve.reply)", json!(false)),
            ("input.lines.map(l, l.n * 10)", json!([10, 20])),
            ("{'a': input.total, 'b': [1, 2]}", json!({"a": 120, "b": [1, 2]})),
            ("string(input.total) + '-' + input.customer.id", json!("120-c-1")),
            ("size(input.lines)", json!(2)),
        ] {
            assert_eq!(evaluate(source), Ok(value), "{source}");
        }
    }

    #[test]
    fn an_absent_member_is_named_by_the_error() {
        let error = evaluate("input.customer.name").unwrap_err();
        assert_eq!(error.to_string(), "cannot be evaluated: `input.customer.name` has no `name`");
        assert!(matches!(evaluate("input.nothing + 1"), Err(ExpressionError::Evaluate(_))));
        assert!(matches!(evaluate("input.total +"), Err(ExpressionError::Parse(_))));
        assert!(matches!(evaluate("1 / 0"), Err(ExpressionError::Evaluate(_))));
        assert!(matches!(evaluate(&"1+".repeat(600)), Err(ExpressionError::TooLong(1200))));
    }

    #[test]
    fn an_expression_that_would_run_away_ends() {
        std::thread::Builder::new().stack_size(EVALUATION_STACK).spawn(run_away).unwrap().join().unwrap();
    }

    fn run_away() {
        let numbers: Vec<i64> = (0..50_000).collect();
        let lines: Vec<Value> = (0..500).map(|n| json!({"sku": format!("s-{n}"), "pieces": n})).collect();
        let text = "x".repeat(1_000_000);
        let input = json!({"l": numbers, "lines": lines, "s": text, "m": {"k": numbers}});
        let evaluate = |source: &str| {
            let scope = Scope { input: &input, steps: &Value::Null, item: None, failure: None };
            Expression::compile(source).unwrap().evaluate(scope)
        };
        let doubled = format!("[input.s]{}", ".map(a, a + a)".repeat(25));
        let nested = format!("[1]{}", ".map(a, [a, a])".repeat(25));
        for source in [
            "input.l.filter(x, input.l.exists(y, y == x))",
            "input.l.all(x, input.l.all(y, input.l.all(z, x + y + z >= 0)))",
            "input.l.map(x, input.l)",
            "input.l.exists(x, input.s.contains(string(x) + 'y'))",
            "input.l.exists(x, x == -1 || input.l.exists(y, y == -1))",
            "input.l.all(x, x in input.m.k)",
            "input.l.map(x, {'a': input.m, 'b': input.m})",
            &doubled,
            &nested,
        ] {
            let error = evaluate(source).unwrap_err();
            assert!(error.to_string().contains("takes more than"), "{source}: {error}");
        }
        for source in [
            "input.lines.map(l, {'sku': l.sku, 'pieces': l.pieces * 2})",
            "input.lines.filter(l, l.pieces > 10).map(l, l.sku)",
            "input.lines.exists(l, l.sku == 's-499')",
            "input.s + input.s",
            "size(input.l) + size(input.s)",
        ] {
            assert!(evaluate(source).is_ok(), "{source}");
        }
    }

    #[test]
    fn errors_name_types_and_members_and_no_values() {
        let input = json!({"secret": "hunter2", "list": ["hunter2"], "map": {"hunter2": "hunter2"}, "n": 4242_u64});
        let steps = json!({});
        for (source, wanted) in [
            ("input.secret + 1", "`add` of string and int is not defined"),
            ("input.secret - input.n", "`sub` of string and int is not defined"),
            ("-input.secret", "not defined"),
            ("int(input.secret)", "`int` fails for the value that it is given"),
            ("input.map[input.n]", ""),
            ("input.map[input.secret + 'x']", "a member that it reads is absent"),
            ("input.list[input.n]", "beyond the end"),
            ("input.n / 0", "divides by zero"),
            ("input.n + 9223372036854775807", "`add` overflows"),
            ("input.absent + 1", "there is no `input.absent`"),
            ("input.secret.x + 1", "there is no `input.secret.x`"),
            ("input.secret.absent", "`input.secret.absent` has no `absent`"),
            ("size(input.n)", ""),
            ("input.secret ? 1 : 2", ""),
            ("input.list.all(x, x)", ""),
            ("{input.list: 1}", ""),
        ] {
            let scope = Scope { input: &input, steps: &steps, item: None, failure: None };
            let error = Expression::compile(source).unwrap().evaluate(scope).unwrap_err().to_string();
            assert!(error.contains(wanted), "{source}: {error}");
            assert!(!error.contains("hunter2") && !error.contains("4242"), "{source}: {error}");
        }
    }

    #[test]
    fn compiled_expressions_are_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Expression>();
    }
}
