//! A panic ends the orchestrator, and recovery would evaluate the same expression again. So no expression that compiles
//! may panic, whatever the values are. Expressions are generated at random; `WEFT_SEEDS` sets how many.

use std::{env, panic};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

use super::expression::{EVALUATION_STACK, Expression, Scope};

const EXPRESSIONS: u64 = 2_000;

/// Without the smallest integer, whose negation panics in builds with overflow checks.
const ATOMS: &[&str] = &[
    "input",
    "input.n",
    "input.s",
    "input.e",
    "input.l",
    "input.m",
    "input.big",
    "input.f",
    "input.none",
    "x",
    "0",
    "1",
    "-1",
    "2u",
    "1.5",
    "-0.0",
    "9223372036854775807",
    "-9223372036854775807",
    "18446744073709551615u",
    "1e308",
    "''",
    "'ü\\n'",
    "'10'",
    "'NaN'",
    "true",
    "false",
    "null",
    "[]",
    "{}",
    "b'a'",
    "b''",
    "size{}",
    "'\\u00fc'",
    "r'\\d'",
    "\"\"\"a\"\"\"",
    "steps['a-b'].reply",
    "failure.reason",
    "input.l[0]",
    "input.?n",
    "input.m['k']",
];
const BINARY: &[&str] = &["+", "-", "*", "/", "%", "==", "!=", "<", "<=", ">", ">=", "&&", "||", "in"];
const FUNCTIONS: &[&str] = &[
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "string",
    "int",
    "uint",
    "double",
    "bytes",
    "max",
    "min",
    "has",
    "matches",
    "dyn",
    "type",
    "duration",
    "timestamp",
];
const MACROS: &[&str] = &["all", "exists", "exists_one", "map", "filter"];

fn grown(random: &mut StdRng, depth: u32) -> String {
    let one = |random: &mut StdRng| grown(random, depth.saturating_sub(1));
    let pick = |random: &mut StdRng, of: &[&str]| (*of.choose(random).unwrap()).to_owned();
    match if depth == 0 { 0 } else { random.random_range(0..12) } {
        0 | 1 => pick(random, ATOMS),
        2 | 3 => format!("{} {} {}", one(random), pick(random, BINARY), one(random)),
        4 => format!("({})", one(random)),
        5 => {
            let arguments: Vec<_> = (0..random.random_range(0..4)).map(|_| one(random)).collect();
            format!("{}({})", pick(random, FUNCTIONS), arguments.join(", "))
        }
        6 => {
            let arguments: Vec<_> = (0..random.random_range(0..3)).map(|_| one(random)).collect();
            format!("({}).{}({})", one(random), pick(random, FUNCTIONS), arguments.join(", "))
        }
        7 => format!("({}).{}(x, {})", one(random), pick(random, MACROS), one(random)),
        8 => format!("({}) ? ({}) : ({})", one(random), one(random), one(random)),
        9 => format!("[{}, {}][{}]", one(random), one(random), one(random)),
        10 => format!("{{{}: {}}}[{}]", one(random), one(random), one(random)),
        _ => format!("{}({})", pick(random, &["-", "!"]), one(random)),
    }
}

fn evaluate(source: &str) -> bool {
    let input = json!({
        "n": 3, "s": "text", "e": "", "l": [1, "a", null, {"k": 2}], "m": {"k": "v"}, "big": i64::MAX, "f": 1e300, "none": null
    });
    let steps = json!({"a-b": {"reply": [1, 2, 3]}});
    let failure = json!({"reason": "R"});
    let scope = Scope { input: &input, steps: &steps, item: None, failure: Some(&failure) };
    Expression::compile(source).is_ok_and(|expression| {
        let value: Result<Value, _> = expression.evaluate(scope);
        value.is_ok()
    })
}

#[test]
fn no_expression_panics() {
    let expressions = env::var("WEFT_SEEDS").ok().map_or(EXPRESSIONS, |text| text.parse().unwrap());
    let mut valued = 0_u64;
    for seed in 0..expressions {
        let source = grown(&mut StdRng::seed_from_u64(seed), 4);
        let value = panic::catch_unwind(|| evaluate(&source)).unwrap_or_else(|_| panic!("`{source}` panics"));
        valued += u64::from(value);
    }
    assert!(valued > expressions / 100, "{valued} of {expressions} have a value");
}

#[test]
fn depth_has_an_end() {
    // as deep as the threads of the engine are
    std::thread::Builder::new().stack_size(EVALUATION_STACK).spawn(nest).unwrap().join().unwrap();
}

fn nest() {
    let shapes = [
        ("(", ")"),
        ("[", "]"),
        ("-", ""),
        ("- ", ""),
        ("!", ""),
        ("{1:", "}"),
        ("size(", ")"),
        ("string([", "])"),
        ("true?1:", ""),
        ("(true?1:", ")"),
        ("1+", ""),
        ("1<", ""),
        ("1==", ""),
        ("true||", ""),
        ("", ".a"),
        ("", "[0]"),
        ("'))'+(", ")"),
        ("", ".size()"),
        ("[1].map(x,", ")"),
    ];
    for (open, close) in shapes {
        for times in [8, 9, 16, 48, 96, 200, 495, 990] {
            if times * (open.len() + close.len()) < 990 {
                evaluate(&format!("{}input{}", open.repeat(times), close.repeat(times)));
            }
        }
    }
}
