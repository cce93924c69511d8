//! What an NBD device is to us, decided from what was seen of it: pure, so that every combination can be tried.
//!
//! Only `ours-leaked` is ever disconnected, so it is what is left when everything else is ruled out: proof that it
//! is ours, and proof that nobody needs it. Any doubt is [`Verdict::Unknown`].

use serde::Serialize;

use super::volume_of;
use crate::values::VolumeId;

/// What a connected NBD device is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Ours: mounted, held or open.
    OursInUse,
    /// Ours, and nobody uses it at the moment; a server or a command stands behind it.
    OursIdle,
    /// Ours, and nothing stands behind or before it.
    OursLeaked,
    /// Somebody else's.
    Foreign,
    /// Not known for sure.
    Unknown,
}

impl Verdict {
    /// Each of them.
    pub const ALL: [Verdict; 5] =
        [Verdict::OursInUse, Verdict::OursIdle, Verdict::OursLeaked, Verdict::Foreign, Verdict::Unknown];

    /// The word, as in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::OursInUse => "ours-in-use",
            Verdict::OursIdle => "ours-idle",
            Verdict::OursLeaked => "ours-leaked",
            Verdict::Foreign => "foreign",
            Verdict::Unknown => "unknown",
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What `/sys/block/nbdN/backend` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// This, without the line's end.
    Text(String),
    /// There is no such file on a kernel that makes one for every identifier: the device was connected without.
    Absent,
    /// The kernel is older than 5.14 and knows no identifiers.
    Unsupported,
    /// It could not be read.
    Unreadable(String),
}

/// What our own records say of an index; asked only where the kernel knows no identifiers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// The volume that was connected there.
    pub volume: VolumeId,
    /// Whether what is connected now is the recorded connection: the kernel shows the same process.
    pub fits: bool,
}

impl Recorded {
    /// Of the records that name an index, each with the process that made its connection: the one that `connected_by`
    /// proves. A record may be stale, and then another volume's is the true one; two that both fit prove nothing.
    pub fn among(records: &[(VolumeId, Option<u32>)], connected_by: Option<u32>) -> Option<Recorded> {
        let fitting: Vec<_> = records.iter().filter(|(_, by)| by.is_some() && *by == connected_by).collect();
        match fitting[..] {
            [(volume, _)] => Some(Recorded { volume: volume.clone(), fits: true }),
            _ => records.first().map(|(volume, _)| Recorded { volume: volume.clone(), fits: false }),
        }
    }
}

/// How we know that it is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// The identifier that we set when it was connected.
    Backend,
    /// Our own records of the connection; the kernel has no identifiers.
    Journal,
}

/// Whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ownership {
    /// Ours.
    Ours(VolumeId, Proof),
    /// Somebody else's.
    Foreign,
    /// Doubtful, and why.
    Unknown(String),
}

/// Whose a device is. Where there is an identifier, it alone decides: an index that our journal names may have
/// become somebody else's.
pub fn ownership(backend: &Backend, recorded: Option<&Recorded>) -> Ownership {
    match (backend, recorded) {
        (Backend::Text(text), _) => {
            volume_of(text).map_or(Ownership::Foreign, |v| Ownership::Ours(v, Proof::Backend))
        }
        (Backend::Absent, _) | (Backend::Unsupported, None) => Ownership::Foreign,
        (Backend::Unsupported, Some(r)) if r.fits => Ownership::Ours(r.volume.clone(), Proof::Journal),
        (Backend::Unsupported, Some(r)) => Ownership::Unknown(format!(
            "a record of {} names it, but cannot prove that it is still the same connection",
            r.volume
        )),
        (Backend::Unreadable(why), _) => Ownership::Unknown(why.clone()),
    }
}

/// What serves a device, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// This runs, and serves it, or may.
    By(String),
    /// This runs of its volume, and has another device.
    Another(String),
    /// Nothing runs of its volume.
    Nobody,
    /// Nothing was seen to run, but this could not be looked at.
    Unknown(String),
}

impl Served {
    /// Whether anything runs of its volume, for this device or another one.
    pub fn is_somebody(&self) -> bool {
        matches!(self, Served::By(_) | Served::Another(_))
    }
}

/// What was seen of a connected device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// Whose it is.
    pub ownership: Ownership,
    /// Who uses it, in words: a mount, a holder, an opener.
    pub used_by: Option<String>,
    /// What serves it.
    pub served: Served,
    /// An operation that holds its volume's lock, in words.
    pub operation: Option<String>,
    /// What could not be looked at.
    pub doubts: Vec<String>,
}

/// The verdict, and why.
pub fn judge(seen: &Evidence) -> (Verdict, String) {
    match &seen.ownership {
        Ownership::Foreign => return (Verdict::Foreign, "its backend identifier is not ours".into()),
        Ownership::Unknown(why) => return (Verdict::Unknown, why.clone()),
        Ownership::Ours(..) => {}
    }
    if let Some(user) = &seen.used_by {
        let why = match &seen.served {
            Served::By(_) => user.clone(),
            Served::Another(other) => format!("{user}, but {other}: its I/O waits, or fails"),
            Served::Nobody => format!("{user}, but nothing serves it: its I/O waits, or fails"),
            Served::Unknown(doubt) => format!("{user}; whether anything serves it is not known: {doubt}"),
        };
        return (Verdict::OursInUse, why);
    }
    let unseen = match &seen.served {
        // What runs may still have to do with the device, whichever it serves.
        Served::By(words) | Served::Another(words) => return (Verdict::OursIdle, words.clone()),
        Served::Nobody => None,
        Served::Unknown(doubt) => Some(doubt),
    };
    if let Some(operation) = &seen.operation {
        return (Verdict::OursIdle, operation.clone());
    }
    match seen.doubts.first().or(unseen) {
        Some(doubt) => (Verdict::Unknown, doubt.clone()),
        None => {
            (Verdict::OursLeaked, "no mount, no holder, nobody has it open, and nothing serves it".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vol() -> VolumeId {
        "vol1".parse().unwrap()
    }

    fn seen(ownership: Ownership) -> Evidence {
        Evidence { ownership, used_by: None, served: Served::Nobody, operation: None, doubts: vec![] }
    }

    #[test]
    fn only_exactly_our_identifier_is_ours() {
        let whose = |text: &str| ownership(&Backend::Text(text.into()), None);
        assert_eq!(whose("zerofs:vol1"), Ownership::Ours(vol(), Proof::Backend));
        for text in [
            "",
            "zerofs",
            "zerofs:",
            "zerofs:../x",
            "zerofs:a..b",
            "zerofs:vol1 ",
            " zerofs:vol1",
            "zerofs: vol1",
            "zerofs:vol1\n",
            "ZEROFS:vol1",
            "Zerofs:vol1",
            "zerofs:vol1/",
            "zerofs:/vol1",
            "zerofs:zerofs:vol1",
            "zerofs::vol1",
            "xzerofs:vol1",
            "nbdkit",
        ] {
            assert_eq!(whose(text), Ownership::Foreign, "{text:?}");
        }
        let long = format!("zerofs:{}", "x".repeat(129));
        assert_eq!(whose(&long), Ownership::Foreign);
    }

    #[test]
    fn where_there_is_an_identifier_the_journal_does_not_count() {
        let ours = Recorded { volume: vol(), fits: true };
        assert_eq!(ownership(&Backend::Text("other".into()), Some(&ours)), Ownership::Foreign);
        assert_eq!(ownership(&Backend::Absent, Some(&ours)), Ownership::Foreign);
        assert!(matches!(ownership(&Backend::Unreadable("x".into()), Some(&ours)), Ownership::Unknown(_)));
        assert_eq!(ownership(&Backend::Unsupported, None), Ownership::Foreign);
        assert_eq!(ownership(&Backend::Unsupported, Some(&ours)), Ownership::Ours(vol(), Proof::Journal));
        let other = Recorded { fits: false, ..ours };
        assert!(matches!(ownership(&Backend::Unsupported, Some(&other)), Ownership::Unknown(_)));
    }

    #[test]
    fn leaked_is_what_is_left_when_all_else_is_ruled_out() {
        // Every combination of the five answers: exactly one of them is a leak.
        let ownerships = [
            Ownership::Ours(vol(), Proof::Backend),
            Ownership::Ours(vol(), Proof::Journal),
            Ownership::Foreign,
            Ownership::Unknown("?".into()),
        ];
        let some = |bit: u32, n: u32| (n >> bit & 1 == 1).then(|| "x".to_owned());
        for whose in ownerships {
            for n in 0..32 {
                let served = match n >> 3 {
                    0 => Served::Nobody,
                    1 => Served::By("x".into()),
                    2 => Served::Another("x".into()),
                    _ => Served::Unknown("x".into()),
                };
                let e = Evidence {
                    used_by: some(0, n),
                    operation: some(1, n),
                    doubts: some(2, n).into_iter().collect(),
                    served,
                    ..seen(whose.clone())
                };
                let ours = matches!(whose, Ownership::Ours(..));
                let (verdict, why) = judge(&e);
                assert_eq!(verdict == Verdict::OursLeaked, ours && n == 0, "{e:?}");
                assert_eq!(verdict == Verdict::Foreign, whose == Ownership::Foreign, "{e:?}");
                assert_eq!(verdict == Verdict::OursInUse, ours && n & 1 == 1, "{e:?}");
                assert!(!why.is_empty());
            }
        }
    }
}
