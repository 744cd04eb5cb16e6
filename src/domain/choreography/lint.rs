//! The lint of a choreography: finds what is wrong with it before anything is tracked. Pure; the operator puts the findings into
//! `Accepted=False`. Whether the named services exist is not known here.

use std::collections::{BTreeMap, BTreeSet};

use super::definition::{Definition, Kind, Reaction};
use crate::domain::saga::lint::Finding;

/// All faults of `definition`, in the order of its fields; empty when it can be followed.
pub fn lint(definition: &Definition) -> Vec<Finding> {
    let mut findings = Findings { definition, reachable: definition.reachable(), found: Vec::new() };
    findings.reactions();
    findings.ends();
    findings.cycles();
    findings.found
}

struct Findings<'a> {
    definition: &'a Definition,
    reachable: BTreeMap<Kind, Vec<usize>>,
    found: Vec<Finding>,
}

impl Findings<'_> {
    fn add(&mut self, field: String, message: String) {
        self.found.push(Finding { field, message });
    }

    fn reactions(&mut self) {
        let definition = self.definition;
        if definition.reactions.is_empty() {
            self.add(
                "spec.reactions".to_owned(),
                "a saga without reactions has nothing to follow; give at least one".to_owned(),
            );
        }
        for (index, reaction) in definition.reactions.iter().enumerate() {
            let field = format!("spec.reactions[{index}]");
            if reaction.within_ms == 0 {
                self.add(
                    format!("{field}.within"),
                    "0s leaves no time to react; give a duration such as `5s`".to_owned(),
                );
            }
            let earlier = definition.reactions.iter().take(index).position(|earlier| {
                earlier.service == reaction.service && earlier.to == reaction.to && earlier.and == reaction.and
            });
            if let Some(earlier) = earlier {
                self.add(
                    field.clone(),
                    format!(
                        "`{}` reacts to {} in spec.reactions[{earlier}] already; list all that it may emit there",
                        reaction.service, reaction.to
                    ),
                );
            }
            for (at, cause) in reaction.causes().enumerate() {
                let field = if at == 0 { format!("{field}.to") } else { format!("{field}.and[{}]", at - 1) };
                self.emitted(&field, cause);
            }
            for (at, kind) in reaction.outcomes().enumerate() {
                self.leads_on(&format!("{field}.emits[{at}]"), &kind);
            }
        }
    }

    /// `kind` is emitted by somebody.
    fn emitted(&mut self, field: &str, kind: &Kind) -> bool {
        let definition = self.definition;
        let is_emitted = definition.declares(kind);
        if !is_emitted {
            let Kind { service, event } = kind;
            self.add(
                field.to_owned(),
                format!(
                    "nobody emits {kind}: it is neither spec.startOn nor in the `emits` of a reaction of `{service}`; correct the name, or add `{event}` there"
                ),
            );
        }
        is_emitted
    }

    /// After `kind` the saga goes on or ends.
    fn leads_on(&mut self, field: &str, kind: &Kind) {
        let definition = self.definition;
        let is_waited_for = definition.reactions.iter().any(|reaction| reaction.causes().any(|cause| cause == kind));
        let is_end = definition.completes.contains(kind) || definition.compensates.contains(kind);
        if !is_waited_for && !is_end {
            self.add(
                field.to_owned(),
                format!(
                    "the reaction can never end the saga: nobody reacts to {kind}, and it is in neither spec.completes nor spec.compensates; add a reaction to it, or list it in one of them"
                ),
            );
        }
    }

    fn ends(&mut self) {
        let definition = self.definition;
        if definition.completes.is_empty() {
            self.add("spec.completes".to_owned(), "no event ends the saga well; list at least one".to_owned());
        }
        for (index, kind) in definition.completes.iter().enumerate() {
            let field = format!("spec.completes[{index}]");
            if self.emitted(&field, kind) && !self.reachable.contains_key(kind) {
                self.add(field, format!("no chain of reactions leads from {} to {kind}", definition.start));
            }
        }
        for (index, kind) in definition.compensates.iter().enumerate() {
            let field = format!("spec.compensates[{index}]");
            if definition.completes.contains(kind) {
                self.add(field, format!("{kind} is in spec.completes, too; an event ends the saga in one way"));
            } else if self.emitted(&field, kind) && !self.reachable.contains_key(kind) {
                self.add(
                    field,
                    format!(
                        "no failure reaches this compensation: no chain of reactions leads from {} to {kind}",
                        definition.start
                    ),
                );
            }
        }
    }

    /// Finds one cycle for each event that is on one, and reports each cycle once.
    fn cycles(&mut self) {
        let mut reported: BTreeSet<Vec<Kind>> = BTreeSet::new();
        let kinds: Vec<_> = self.reachable.keys().cloned().collect();
        for kind in kinds {
            let Some(cycle) = self.cycle(&kind) else { continue };
            let mut members = cycle.clone();
            members.sort();
            if !reported.insert(members) {
                continue;
            }
            let path = cycle.iter().chain(std::iter::once(&kind)).map(ToString::to_string).collect::<Vec<_>>();
            self.add(
                "spec.reactions".to_owned(),
                format!(
                    "the saga may never end, since its reactions are a cycle: {}; give what is repeated a type of its own",
                    path.join(" → ")
                ),
            );
        }
    }

    /// The shortest way from `kind` back to it, which begins with it.
    fn cycle(&self, kind: &Kind) -> Option<Vec<Kind>> {
        let mut ways: Vec<Vec<Kind>> = vec![vec![kind.clone()]];
        let mut visited: BTreeSet<Kind> = BTreeSet::new();
        while !ways.is_empty() {
            let mut longer = Vec::new();
            for way in ways {
                let follow = way.last().and_then(|last| self.reachable.get(last)).into_iter().flatten();
                for outcome in
                    follow.filter_map(|&index| self.definition.reactions.get(index)).flat_map(Reaction::outcomes)
                {
                    if outcome == *kind {
                        return Some(way);
                    }
                    if visited.insert(outcome.clone()) {
                        longer.push(way.iter().cloned().chain([outcome]).collect());
                    }
                }
            }
            ways = longer;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaction(on: (&str, &str), service: &str, emits: &[&str]) -> Reaction {
        Reaction {
            to: Kind::new(on.0, on.1),
            and: Vec::new(),
            service: service.to_owned(),
            emits: emits.iter().map(|&event| event.to_owned()).collect(),
            within_ms: 5_000,
        }
    }

    fn create_order() -> Definition {
        Definition {
            name: "create-order".to_owned(),
            version: String::new(),
            start: Kind::new("orders", "OrderCreated"),
            reactions: vec![
                reaction(("orders", "OrderCreated"), "customers", &["CreditReserved", "CreditLimitExceeded"]),
                reaction(("customers", "CreditReserved"), "orders", &["OrderApproved"]),
                reaction(("customers", "CreditLimitExceeded"), "orders", &["OrderRejected"]),
            ],
            completes: vec![Kind::new("orders", "OrderApproved")],
            compensates: vec![Kind::new("orders", "OrderRejected")],
        }
    }

    fn findings(change: impl FnOnce(&mut Definition)) -> Vec<String> {
        let mut definition = create_order();
        change(&mut definition);
        lint(&definition).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_choreography_that_can_end_in_two_ways_has_no_findings() {
        assert_eq!(findings(|_| {}), Vec::<String>::new());
        let failures = create_order().failures();
        let of_customers = Kind::new("customers", "CreditLimitExceeded");
        assert_eq!(failures, [of_customers, Kind::new("orders", "OrderRejected")].into());
    }

    #[test]
    fn an_event_that_nobody_emits_is_found() {
        let found = findings(|definition| definition.reactions[1].to.event = "CreditReservd".to_owned());
        assert_eq!(
            found[..2],
            [
                "spec.reactions[0].emits[0]: the reaction can never end the saga: nobody reacts to customers CreditReserved, and it is in neither spec.completes nor spec.compensates; add a reaction to it, or list it in one of them",
                "spec.reactions[1].to: nobody emits customers CreditReservd: it is neither spec.startOn nor in the `emits` of a reaction of `customers`; correct the name, or add `CreditReservd` there",
            ]
        );
        assert_eq!(
            found[2],
            "spec.completes[0]: no chain of reactions leads from orders OrderCreated to orders OrderApproved"
        );
        assert_eq!(found.len(), 3, "{found:?}");
    }

    #[test]
    fn a_compensation_that_no_failure_reaches_is_found() {
        let found = findings(|definition| drop(definition.reactions[0].emits.pop()));
        assert_eq!(
            found,
            [
                "spec.reactions[2].to: nobody emits customers CreditLimitExceeded: it is neither spec.startOn nor in the `emits` of a reaction of `customers`; correct the name, or add `CreditLimitExceeded` there",
                "spec.compensates[0]: no failure reaches this compensation: no chain of reactions leads from orders OrderCreated to orders OrderRejected",
            ]
        );
    }

    #[test]
    fn a_reaction_that_can_never_end_and_an_end_in_two_ways_are_found() {
        let found = findings(|definition| drop(definition.compensates.pop()));
        assert_eq!(
            found,
            [
                "spec.reactions[2].emits[0]: the reaction can never end the saga: nobody reacts to orders OrderRejected, and it is in neither spec.completes nor spec.compensates; add a reaction to it, or list it in one of them"
            ]
        );
        let found = findings(|definition| definition.compensates.push(Kind::new("orders", "OrderApproved")));
        assert_eq!(
            found,
            ["spec.compensates[1]: orders OrderApproved is in spec.completes, too; an event ends the saga in one way"]
        );
    }

    #[test]
    fn a_cycle_is_found_once() {
        let found = findings(|definition| {
            definition.reactions[2].emits.push("OrderChanged".to_owned());
            let again = reaction(("orders", "OrderChanged"), "customers", &["CreditReserved", "CreditLimitExceeded"]);
            definition.reactions.push(again);
        });
        assert_eq!(
            found,
            [
                "spec.reactions: the saga may never end, since its reactions are a cycle: customers CreditLimitExceeded → orders OrderChanged → customers CreditLimitExceeded; give what is repeated a type of its own"
            ]
        );
    }

    #[test]
    fn a_reaction_that_is_declared_twice_or_has_no_time_is_found() {
        let found = findings(|definition| {
            definition.reactions.push(reaction(("customers", "CreditReserved"), "orders", &["OrderApproved"]));
            definition.reactions[0].within_ms = 0;
        });
        assert_eq!(
            found,
            [
                "spec.reactions[0].within: 0s leaves no time to react; give a duration such as `5s`",
                "spec.reactions[3]: `orders` reacts to customers CreditReserved in spec.reactions[1] already; list all that it may emit there",
            ]
        );
    }

    #[test]
    fn a_reaction_that_waits_for_several_events_is_reached_when_each_of_them_can_occur() {
        let change = |stock_emits: &'static str| {
            move |definition: &mut Definition| {
                definition.reactions.push(reaction(("orders", "OrderCreated"), "stock", &[stock_emits]));
                definition.reactions[1].and = vec![Kind::new("stock", "StockReserved")];
            }
        };
        assert_eq!(findings(change("StockReserved")), Vec::<String>::new());
        let found = findings(change("StockTaken"));
        assert!(found.iter().any(|f| f.starts_with("spec.reactions[1].and[0]: nobody emits stock StockReserved")));
    }
}
