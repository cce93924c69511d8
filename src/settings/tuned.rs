//! Settings of one volume's own, over those of the installation: a VolumeAttributesClass sets them. They are kept in the
//! volume's record and count from its next start on.

use std::collections::BTreeMap;

use super::{Config, KEYS, ResourceSettings, Settings, check_log_filter, is_object_name, shown};
use crate::error::{Error, Result};

/// The ConfigMap keys that a volume may have of its own.
pub const MUTABLE_KEYS: [&str; 7] = [
    "cacheDiskSizeGB",
    "cacheMemorySizeGB",
    "cpuRequest",
    "cpuLimit",
    "memoryRequest",
    "memoryLimit",
    "rustLog",
];

/// Checks the keys and values of a volume's own settings.
pub fn check_tuning(tuning: &BTreeMap<String, String>) -> Result<()> {
    Overlay::parse(tuning).map(drop)
}

/// Refuses what cannot be the name of a Kubernetes object.
pub fn check_object_name(what: &str, name: &str) -> Result<()> {
    if is_object_name(name) {
        return Ok(());
    }
    Err(Error::usage(format!("{what} is not the name of a Kubernetes object"))
        .hint("give its metadata.name: lower-case letters, digits, '-' and '.'"))
}

struct Overlay {
    disk_gb: Option<f64>,
    memory_gb: Option<f64>,
    resources: ResourceSettings,
    rust_log: Option<String>,
}

impl Overlay {
    fn parse(tuning: &BTreeMap<String, String>) -> Result<Overlay> {
        let mut map = BTreeMap::new();
        for (name, value) in tuning {
            let Some(key) = MUTABLE_KEYS.iter().find(|k| *k == name) else {
                let why = if KEYS.iter().any(|(key, _)| key == name) {
                    "cannot be changed for one volume"
                } else {
                    "is not known"
                };
                return Err(Error::usage(format!("the mutable parameter \"{}\" {why}", shown(name)))
                    .hint(format!("what can be changed: {}", MUTABLE_KEYS.join(", "))));
            };
            if !value.is_empty() {
                map.insert(*key, value.clone());
            }
        }
        let c = Config { map: &map, origin: "mutable parameters" };
        let overlay = Overlay {
            disk_gb: c.gigabytes("cacheDiskSizeGB")?,
            memory_gb: c.gigabytes("cacheMemorySizeGB")?,
            resources: c.resources()?,
            rust_log: c.parse("rustLog", check_log_filter)?,
        };
        c.check_resources(&overlay.resources)?;
        Ok(overlay)
    }
}

impl Settings {
    /// These settings with a volume's own over them.
    pub fn tuned(&self, tuning: &BTreeMap<String, String>) -> Result<Settings> {
        let mut settings = self.clone();
        let own = Overlay::parse(tuning)?;
        settings.cache.disk_gb = own.disk_gb.or(settings.cache.disk_gb);
        settings.cache.memory_gb = own.memory_gb.or(settings.cache.memory_gb);
        let (r, o) = (&mut settings.resources, own.resources);
        r.cpu_limit = o.cpu_limit.or(r.cpu_limit.take());
        r.memory_limit = o.memory_limit.or(r.memory_limit.take());
        // What the installation requests may be more than this volume's own limit; then the limit is the request.
        r.cpu_request = o.cpu_request.or(r.cpu_request.take()).min_of(r.cpu_limit.as_ref());
        r.memory_request = o.memory_request.or(r.memory_request.take()).min_of(r.memory_limit.as_ref());
        settings.rust_log = own.rust_log.or(settings.rust_log.take());
        Ok(settings)
    }
}

/// A request never exceeds its limit.
trait MinOf {
    fn min_of(self, limit: Option<&crate::quantity::Quantity>) -> Self;
}

impl MinOf for Option<crate::quantity::Quantity> {
    fn min_of(self, limit: Option<&crate::quantity::Quantity>) -> Self {
        match (self, limit) {
            (Some(request), Some(limit)) if request > *limit => Some(limit.clone()),
            (request, _) => request,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn own_settings_win_and_the_others_stay() {
        let (base, _) = super::super::Documents::default().settings(None, &|_| None).unwrap();
        let own = map(&[("cacheMemorySizeGB", "0.5"), ("memoryLimit", "2Gi"), ("rustLog", "debug")]);
        let tuned = base.tuned(&own).unwrap();
        assert_eq!(tuned.cache.memory_gb, Some(0.5));
        assert_eq!(tuned.cache.disk_gb, base.cache.disk_gb);
        assert_eq!(tuned.resources.memory_limit.unwrap().to_string(), "2Gi");
        assert_eq!(tuned.rust_log.as_deref(), Some("debug"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (key, value, word) in [
            ("storageURL", "s3://x", "cannot be changed"),
            ("colour", "red", "is not known"),
            ("cacheDiskSizeGB", "-1", "cacheDiskSizeGB"),
            ("cpuLimit", "many", "cpuLimit"),
            ("rustLog", "a b", "rustLog"),
        ] {
            let e = check_tuning(&map(&[(key, value)])).unwrap_err();
            assert_eq!(e.kind(), crate::error::Kind::Usage);
            assert!(e.message().contains(word) && e.hint_text().is_some(), "{e}");
        }
        assert!(check_tuning(&map(&[("cpuRequest", "2"), ("cpuLimit", "1")])).is_err());
        assert!(check_tuning(&BTreeMap::new()).is_ok());
    }
}
