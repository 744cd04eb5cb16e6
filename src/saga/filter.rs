//! Which instances of a saga are meant: by people who list them, and by verbs for many; and where a page of a list begins.

use std::{cmp::Reverse, fmt};

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use uuid::Uuid;

use super::{
    compiled::{MAX_KEY, may_be_key},
    shard::Instance,
    view::View,
};
use crate::domain::saga::state::Status;

/// All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    pub status: Option<Status>,
    /// The business key.
    pub key: Option<String>,
    /// A step in progress: `NAME`, or `NAME.ITEM` in a `forEach`. An instance that has ended has none.
    pub step: Option<String>,
    pub started_before: Option<Timestamp>,
}

/// A [`Filter`] as the API has it: query parameters.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FilterQuery {
    pub state: Option<String>,
    pub key: Option<String>,
    pub step: Option<String>,
    /// A duration such as `90m`, since the start.
    pub older_than: Option<String>,
}

impl FilterQuery {
    /// What is empty is not given. The error is one sentence.
    pub(super) fn parse(self, now: Timestamp) -> Result<Filter, String> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let status = given(self.state).map(|text| {
            let names = Status::ALL.map(Status::as_str).join(", ");
            Status::parse(&text).ok_or_else(|| format!("there is no state `{text}`; there are {names}"))
        });
        let started_before = given(self.older_than).map(|text| {
            let age = text.parse::<SignedDuration>().ok().filter(|age| !age.is_negative());
            let before = age.and_then(|age| now.checked_sub(age).ok());
            before.ok_or_else(|| format!("olderThan={text} is no duration; give one such as `30s`, `90m` or `24h`"))
        });
        let key = given(self.key);
        if key.as_deref().is_some_and(|key| !may_be_key(key)) {
            return Err(format!(
                "no instance has this key: it is longer than {MAX_KEY} bytes, or has control characters"
            ));
        }
        Ok(Filter {
            status: status.transpose()?,
            key,
            step: given(self.step),
            started_before: started_before.transpose()?,
        })
    }
}

impl Filter {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether instances that have ended may be meant.
    pub(super) fn admits_ended(&self) -> bool {
        self.step.is_none()
            && self.status.is_none_or(|status| matches!(status, Status::Completed | Status::Compensated))
    }

    /// Whether instances that run may be meant.
    pub(super) fn admits_live(&self) -> bool {
        self.status.is_none_or(|status| !matches!(status, Status::Completed | Status::Compensated))
    }

    /// Of a live instance.
    pub(super) fn admits(&self, instance: &Instance) -> bool {
        let Instance { compiled, state, key, started_at, .. } = instance;
        let is_in = |step: &String| state.active.iter().any(|active| compiled.tree.path(active.at) == step.as_str());
        self.status.is_none_or(|status| state.status() == status)
            && self.key.as_ref().is_none_or(|wanted| key.as_ref() == Some(wanted))
            && self.started_before.is_none_or(|before| *started_at < before)
            && self.step.as_ref().is_none_or(is_in)
    }
}

/// Where a page begins: after this instance. Lists begin with what started last; what started at the same time is in the order of
/// the ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    pub started_at: Timestamp,
    pub id: Uuid,
}

/// As the API has it.
impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.started_at, self.id)
    }
}

impl Cursor {
    pub(super) fn of(view: &View) -> Self {
        Self { started_at: view.started_at, id: view.id }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (started_at, id) = text.split_once('_')?;
        Some(Self { started_at: started_at.parse().ok()?, id: id.parse().ok()? })
    }

    /// The order of lists.
    pub(super) fn order(self) -> (Reverse<Timestamp>, Uuid) {
        (Reverse(self.started_at), self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_is_written() {
        let cursor =
            |started_at: &str, id: u128| Cursor { started_at: started_at.parse().unwrap(), id: Uuid::from_u128(id) };
        let one = cursor("2026-11-27T10:00:00.000001Z", 7);
        assert_eq!(Cursor::parse(&one.to_string()), Some(one));
        for text in ["", "2026-11-27T10:00:00Z", "7_2026-11-27T10:00:00Z"] {
            assert_eq!(Cursor::parse(text), None, "{text}");
        }
        let mut cursors = [cursor("2026-11-27T10:00:00Z", 2), cursor("2026-11-27T10:00:00Z", 1), one];
        cursors.sort_by_key(|cursor| cursor.order());
        assert_eq!(cursors.map(|cursor| cursor.id.as_u128()), [7, 1, 2]);
    }

    #[test]
    fn a_filter_is_read_from_a_query() {
        let now: Timestamp = "2026-11-27T12:00:00Z".parse().unwrap();
        let query = |state: &str, older_than: &str| {
            let some = |text: &str| Some(text.to_owned());
            FilterQuery { state: some(state), key: some(""), step: some("pack"), older_than: some(older_than) }
                .parse(now)
        };
        let filter = query("stuck", "1h30m").unwrap();
        assert_eq!((filter.status, filter.key.as_deref()), (Some(Status::Stuck), None));
        assert_eq!(filter.started_before, Some("2026-11-27T10:30:00Z".parse().unwrap()));
        assert!(!filter.admits_ended() && !filter.is_empty());
        assert!(FilterQuery::default().parse(now).unwrap().is_empty());
        let names = "Running, Compensating, Stuck, Completed, Compensated";
        assert_eq!(query("Lost", "").unwrap_err(), format!("there is no state `Lost`; there are {names}"));
        for age in ["soon", "-1h", "1y", "3"] {
            assert!(query("", age).unwrap_err().starts_with(&format!("olderThan={age} is no duration")), "{age}");
        }
    }
}
