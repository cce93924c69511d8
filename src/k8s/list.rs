//! A whole list, from its first page to its very end, or an error.

use kube::api::{ListParams, ObjectList};

use super::Cluster;
use super::trouble::{Asked, Trouble, judge, trouble};
use crate::error::{Error, Kind, Result};

/// How often a list is begun: its moment may be forgotten (410 Gone) before its last page was read.
const ATTEMPTS: usize = 4;

/// What of a page matters for the next.
struct Page<T> {
    items: Vec<T>,
    version: String,
    next: Option<String>,
}

/// Reads all pages that `fetch` gets. What `keep` does not want is forgotten at once, so that memory does not grow with it.
pub(super) fn all<K: Clone, T>(
    cluster: &Cluster,
    what: &'static str,
    kind: &str,
    keep: impl Fn(K) -> Option<T>,
    fetch: impl AsyncFn(ListParams) -> kube::Result<ObjectList<K>>,
) -> Result<Vec<T>> {
    let asked = cluster.asked("list", what);
    for _ in 0..ATTEMPTS {
        if let Some(kept) = attempt(cluster, &asked, kind, &keep, &fetch)? {
            return Ok(kept);
        }
    }
    Err(Error::new(
        Kind::Unreachable,
        format!(
            "cannot list {what}: the server forgot the list {ATTEMPTS} times before it was read to its end"
        ),
    )
    .hint("try again when the API server and its etcd are less busy"))
}

/// None when it has to be begun again.
fn attempt<K: Clone, T>(
    cluster: &Cluster,
    asked: &Asked,
    kind: &str,
    keep: &impl Fn(K) -> Option<T>,
    fetch: &impl AsyncFn(ListParams) -> kube::Result<ObjectList<K>>,
) -> Result<Option<Vec<T>>> {
    let mut kept = Vec::new();
    let (mut next, mut version) = (None::<String>, None::<String>);
    loop {
        // Without a resource version this is a consistent read; the following pages are of the moment of the first.
        let mut page = ListParams::default().limit(cluster.page);
        if let Some(token) = &next {
            page = page.continue_token(token);
        }
        let page = cluster.run(asked, async {
            match fetch(page).await {
                Ok(list) => checked(asked, kind, list).map(Some),
                // Only within a list: the first page has no moment to be forgotten.
                Err(e) if next.is_some() && trouble(&e) == Trouble::Gone => Ok(None),
                Err(e) => Err(judge(asked, &e)),
            }
        })?;
        let Some(page) = page else { return Ok(None) };
        // Another moment, so perhaps another server that does not know ours: what lies between them is in no page.
        if version.get_or_insert_with(|| page.version.clone()) != &page.version {
            return Ok(None);
        }
        kept.extend(page.items.into_iter().filter_map(keep));
        match page.next {
            None => return Ok(Some(kept)),
            Some(same) if Some(&same) == next.as_ref() => {
                return Err(senseless(asked, "the same page again and again"));
            }
            more => next = more,
        }
    }
}

/// The page, if it is one: what stands between us and the server may answer something else, and call it a success.
fn checked<K: Clone>(asked: &Asked, kind: &str, list: ObjectList<K>) -> Result<Page<K>> {
    if list.types.kind != kind {
        return Err(senseless(asked, "something that is no such list"));
    }
    let version = list.metadata.resource_version.filter(|v| !v.is_empty() && v != "0");
    let Some(version) = version else {
        return Err(senseless(asked, "a list of no moment"));
    };
    let next = list.metadata.continue_.filter(|token| !token.is_empty());
    if next.is_none() && list.metadata.remaining_item_count.is_some_and(|n| n > 0) {
        return Err(senseless(asked, "a list that is cut short"));
    }
    Ok(Page { items: list.items, version, next })
}

fn senseless(asked: &Asked, what: &str) -> Error {
    let Asked { verb, what: objects, .. } = asked;
    Error::new(Kind::Unreachable, format!("cannot {verb} {objects}: the server answers with {what}"))
        .hint("see what stands between this machine and the API server: kubectl config view")
}
