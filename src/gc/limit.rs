//! How many volumes one plan may take: a last stop for what no rule foresaw.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// `12`, or `10%` of the volumes in the catalog (but at least one).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// So many.
    Count(usize),
    /// So many of a hundred.
    Percent(u8),
}

impl Default for Limit {
    fn default() -> Self {
        Limit::Percent(10)
    }
}

impl Limit {
    /// The number, when there are `all` volumes.
    pub fn of(self, all: usize) -> usize {
        match self {
            Limit::Count(n) => n,
            Limit::Percent(p) => (all * usize::from(p) / 100).max(1),
        }
    }

    /// Refuses a plan of `wanted` of `all` volumes that is too large.
    pub fn check(self, wanted: usize, all: usize, verb: &str) -> Result<()> {
        let most = self.of(all);
        if wanted <= most {
            return Ok(());
        }
        Err(Error::refused(format!(
            "it would {verb} {wanted} of {all} volumes, and --max-delete is {self}, that is {most}; nothing was changed"
        ))
        .hint(format!("look at them: zerofsctl gc-s3 scan; if that is right: --max-delete {wanted}")))
    }
}

impl FromStr for Limit {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let parsed = match s.strip_suffix('%') {
            Some(p) => p.parse().ok().filter(|p| *p <= 100).map(Limit::Percent),
            None => s.parse().ok().map(Limit::Count),
        };
        parsed.ok_or_else(|| {
            Error::usage(format!("invalid --max-delete {s:?}"))
                .hint("write a number of volumes, such as 12, or a share of them, such as 10%")
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Count(n) => write!(f, "{n}"),
            Limit::Percent(p) => write!(f, "{p}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        for (text, all, most) in [
            ("10%", 0, 1),
            ("10%", 9, 1),
            ("10%", 25, 2),
            ("100%", 7, 7),
            ("0%", 50, 1),
            ("0", 50, 0),
            ("12", 5, 12),
        ] {
            let limit: Limit = text.parse().unwrap();
            assert_eq!(limit.of(all), most, "{text} of {all}");
            assert_eq!(limit.to_string(), text);
            assert!(limit.check(most, all, "delete").is_ok());
            let e = limit.check(most + 1, all, "delete").unwrap_err();
            assert!(e.hint_text().unwrap().contains("--max-delete"), "{e}");
        }
        for bad in ["", "-1", "101%", "1.5", "ten", "%"] {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
    }
}
