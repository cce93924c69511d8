//! Kubernetes quantities, exactly: `500m`, `1Gi`, `1e3`, `0.1`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// An amount as Kubernetes writes it: not negative, exact to a billionth, at most 2⁶³−1. It keeps its spelling, so
/// that a manifest made of it says what the operator said. Compared by amount: `1000m` equals `1`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Quantity {
    nanos: u128,
    text: String,
}

const NANO: u128 = 1_000_000_000;

impl Quantity {
    /// In billionths.
    pub fn nanos(&self) -> u128 {
        self.nanos
    }

    /// In thousandths (millicores for CPU), rounded up as Kubernetes does.
    pub fn millis(&self) -> u64 {
        // At most 2⁶³ thousand fits u128, not u64; nobody has that many cores.
        u64::try_from(self.nanos.div_ceil(NANO / 1000)).unwrap_or(u64::MAX)
    }

    /// In whole units (bytes for memory), rounded up as Kubernetes does.
    pub fn units(&self) -> u64 {
        u64::try_from(self.nanos.div_ceil(NANO)).expect("parsing bounds it to 2^63-1 units")
    }
}

impl FromStr for Quantity {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let shown: String = s.chars().take(40).flat_map(char::escape_debug).collect();
            Error::usage(format!("invalid quantity \"{shown}\": {why}"))
                .hint("write it as Kubernetes does, such as 500m or 2 for CPU, 512Mi or 1Gi for memory")
        };
        if s.starts_with('-') {
            return Err(wrong("it is negative"));
        }
        let unsigned = s.strip_prefix('+').unwrap_or(s);
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return Err(wrong("it does not start with a number"));
        }
        if fraction.contains('.') {
            return Err(wrong("it has two points"));
        }
        let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
        if whole.len() + fraction.len() > 30 {
            return Err(wrong("it has too many digits"));
        }
        let (two, ten): (u32, i32) = match suffix {
            "n" => (0, -9),
            "u" => (0, -6),
            "m" => (0, -3),
            "" => (0, 0),
            "k" => (0, 3),
            "M" => (0, 6),
            "G" => (0, 9),
            "T" => (0, 12),
            "P" => (0, 15),
            "E" => (0, 18),
            "Ki" => (10, 0),
            "Mi" => (20, 0),
            "Gi" => (30, 0),
            "Ti" => (40, 0),
            "Pi" => (50, 0),
            "Ei" => (60, 0),
            _ => match suffix.strip_prefix(['e', 'E']).map(str::parse::<i32>) {
                Some(Ok(exponent)) if (-30..=30).contains(&exponent) => (0, exponent),
                Some(Ok(_)) => return Err(wrong("its exponent is out of range")),
                _ => return Err(wrong("its unit is unknown")),
            },
        };
        let digits: u128 = match format!("{whole}{fraction}").as_str() {
            "" => 0,
            digits => digits.parse().map_err(|_| wrong("it has too many digits"))?,
        };
        // digits · 2^two · 10^(ten + 9 − decimals) billionths
        let scale = ten + 9 - i32::try_from(fraction.len()).expect("at most 30 digits");
        let large = || wrong("it is too large");
        let mut nanos = digits.checked_mul(1 << two).ok_or_else(large)?;
        let power = 10u128.checked_pow(scale.unsigned_abs());
        if nanos == 0 {
            // Zero, whatever its unit.
        } else if scale >= 0 {
            nanos = power.and_then(|p| nanos.checked_mul(p)).ok_or_else(large)?;
        } else {
            let power = power.filter(|p| nanos.is_multiple_of(*p));
            nanos /= power.ok_or_else(|| wrong("it is finer than a billionth"))?;
        }
        if nanos > i64::MAX as u128 * NANO {
            return Err(large());
        }
        Ok(Quantity { nanos, text: s.to_owned() })
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl TryFrom<String> for Quantity {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Quantity> for String {
    fn from(q: Quantity) -> String {
        q.text
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl fmt::Debug for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Quantity({})", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact() {
        let table: [(&str, u128); 19] = [
            ("0", 0),
            ("0Ei", 0),
            ("0e-30", 0),
            ("500m", NANO / 2),
            ("1", NANO),
            ("+1", NANO),
            ("1.", NANO),
            (".5", NANO / 2),
            ("0.1", NANO / 10),
            ("1n", 1),
            ("0.5Ki", 512 * NANO),
            ("1e3", 1000 * NANO),
            ("1E3", 1000 * NANO),
            ("1e-3", NANO / 1000),
            ("1E", 1_000_000_000_000_000_000 * NANO),
            ("1Gi", (1 << 30) * NANO),
            ("1.000000000000000000000G", 1_000_000_000 * NANO),
            ("7Ei", (7 << 60) * NANO),
            ("00000000000000000000000000000000000012", 12 * NANO),
        ];
        for (text, nanos) in table {
            let q: Quantity = text.parse().expect(text);
            assert_eq!(q.nanos(), nanos, "{text}");
            assert_eq!(q.to_string(), text);
        }
        let q: Quantity = "1n".parse().unwrap();
        assert_eq!((q.millis(), q.units()), (1, 1), "rounded up");
        let q: Quantity = "1500m".parse().unwrap();
        assert_eq!((q.millis(), q.units()), (1500, 2));
        assert_eq!("1000m".parse::<Quantity>().unwrap(), "1".parse().unwrap());
        assert!("1G".parse::<Quantity>().unwrap() < "1Gi".parse().unwrap());
        assert_eq!("7Ei".parse::<Quantity>().unwrap().millis(), u64::MAX);
    }

    #[test]
    fn malformed() {
        for bad in [
            "",
            ".",
            "-1",
            "1..2",
            "1.2.3",
            "Gi",
            "1gi",
            "1KI",
            "1 Gi",
            " 1",
            "1K",
            "0x10",
            "1e",
            "1e+",
            "1ee3",
            "1e99",
            "1e3Gi",
            "0.1n",
            "1e-10",
            "8Ei",
            "9.3E",
            "inf",
            "NaN",
            "٣",
            "1G1",
            "1_000",
            "1,5",
            "1111111111111111111111111111111",
        ] {
            let e = bad.parse::<Quantity>().expect_err(bad);
            assert!(e.hint_text().is_some(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics(s in "[+-]?[0-9.]{0,40}[a-zA-Z]{0,2}[+-]?[0-9]{0,12}|\\PC{0,20}") {
            if let Ok(q) = s.parse::<Quantity>() {
                let _ = (q.millis(), q.units());
            }
        }
    }
}
