//! Secrets in memory, and the encryption password of volumes.
//!
//! Promises: a [`Secret`] is wiped when it is dropped and cannot be printed or serialised; a [`PasswordCheck`]
//! tells whether a password is the volume's without telling the password; the password file of the embedded
//! store is made once, readable by its owner only, and never overwritten.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use rand::TryRngCore;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

use crate::atomic_file::{self, FolderLock};
use crate::error::{Doing, Error, Kind, Result};

/// Text that must not be seen: wiped on drop, `***` in debug output, no `Display`, no `Serialize`.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the text over.
    pub fn new(text: String) -> Self {
        Secret(Zeroizing::new(text))
    }

    /// The text, for the one place that has to write it down.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl PartialEq for Secret {
    /// Takes the same time wherever the difference is; only the length shows.
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for Secret {}

/// Refuses what ZeroFS itself would refuse later, and less clearly: fewer than 8 characters, and its placeholder.
pub fn check_strength(password: &Secret) -> Result<()> {
    let hint = "choose a password of at least 8 characters, such as the output of: openssl rand -base64 24";
    if password.expose() == "CHANGEME" {
        return Err(Error::usage("the encryption password is the placeholder CHANGEME").hint(hint));
    }
    if password.expose().chars().count() < 8 {
        return Err(Error::usage("the encryption password has fewer than 8 characters").hint(hint));
    }
    if password.expose().chars().any(|c| c.is_control()) {
        return Err(
            Error::usage("the encryption password contains a line break or control character").hint(hint)
        );
    }
    Ok(())
}

/// A salted argon2id hash of the encryption password, kept in the volume's catalog record, so that a wrong
/// password is found out before ZeroFS is started with it: merely trying it there fences a running server.
///
/// Whoever reads the bucket can try passwords against it, as they can against the wrapped key that ZeroFS keeps
/// there, so it gives nothing new away. It is kept out of debug output all the same.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PasswordCheck(String);

// 7 MiB and 5 passes: about 20 ms, and small beside the command's memory budget of 30 MiB. They are one of the
// equivalent settings that OWASP gives for argon2id.
const MEMORY_KIB: u32 = 7168;
const PASSES: u32 = 5;
const LANES: u32 = 1;
// The random 256 bits that we make for the embedded store cannot be guessed, however quick a guess is; there the
// slowness would only cost a tenth of every attach.
const LEAST_MEMORY_KIB: u32 = 8;

/// Whether the password has the form of [`store_password`]'s own: 64 hexadecimal digits, and not few different ones.
fn is_random(password: &str) -> bool {
    let digits: std::collections::BTreeSet<u8> = password.bytes().collect();
    password.len() == 64
        && digits.len() >= 8
        && digits.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b))
}

impl PasswordCheck {
    /// Hashes `password` with a fresh random salt.
    pub fn new(password: &Secret) -> Result<Self> {
        let unexpected = |e: &dyn fmt::Display| Error::failed(format!("cannot hash the password: {e}"));
        let (memory, passes) =
            if is_random(password.expose()) { (LEAST_MEMORY_KIB, 1) } else { (MEMORY_KIB, PASSES) };
        let params = Params::new(memory, passes, LANES, None).map_err(|e| unexpected(&e))?;
        let mut salt = [0u8; 16];
        random(&mut salt)?;
        let salt = SaltString::encode_b64(&salt).map_err(|e| unexpected(&e))?;
        let hash = Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password(password.expose().as_bytes(), &salt)
            .map_err(|e| unexpected(&e))?;
        Ok(PasswordCheck(hash.to_string()))
    }

    /// Whether `password` is the one that was hashed; compares in constant time.
    ///
    /// A value that is damaged, or that would take unreasonable memory or time, is [`Kind::Refused`]: it came
    /// from the bucket, and "cannot tell" must not read as "wrong" or "right".
    pub fn verify(&self, password: &Secret) -> Result<bool> {
        let damaged = || {
            Error::refused("the volume's recorded password check is damaged or of an unknown kind")
                .hint("upgrade zerofsctl; if that does not help, restore the volume's catalog record")
        };
        let hash = PasswordHash::new(&self.0).map_err(|_| damaged())?;
        let params = Params::try_from(&hash).map_err(|_| damaged())?;
        let bounded = params.m_cost() <= 64 * 1024 && params.t_cost() <= 50 && params.p_cost() <= 8;
        if hash.algorithm != Algorithm::Argon2id.ident()
            || hash.salt.is_none()
            || hash.hash.is_none()
            || !bounded
        {
            return Err(damaged());
        }
        match Argon2::default().verify_password(password.expose().as_bytes(), &hash) {
            Ok(()) => Ok(true),
            Err(argon2::password_hash::Error::Password) => Ok(false),
            Err(_) => Err(damaged()),
        }
    }

    /// [`PasswordCheck::verify`] as an error with a hint when the password is wrong.
    pub fn require(&self, password: &Secret) -> Result<()> {
        if self.verify(password)? {
            return Ok(());
        }
        Err(Error::usage("the encryption password is not the one that this volume was made with").hint(
            "give the volume's own password: --secret FILE, ZEROFS_ENCRYPTION_PASSWORD_FILE, or \
             ZEROFS_ENCRYPTION_PASSWORD",
        ))
    }
}

impl fmt::Debug for PasswordCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordCheck(…)")
    }
}

/// Whether [`store_password`] found the file or made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was there.
    Found,
    /// It was made now.
    Made,
}

/// The password of the embedded store, from the file at `path`; a random one is made there when there is none.
///
/// The file is 0600 and is never overwritten: without it, the store's volumes cannot be read. A file that others
/// may read, that is not a plain file, or that holds no usable password is an error.
pub fn store_password(path: &Path) -> Result<(Secret, Origin)> {
    if let Some(found) = read_store_password(path)? {
        return Ok((found, Origin::Found));
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    atomic_file::create_folder(dir).doing("create the folder", dir)?;
    let _lock =
        FolderLock::take(dir, Duration::from_secs(10)).doing("lock", dir).map_err(|e| e.hint(HINT_LOCK))?;
    // Another process may have made it while we waited for the lock.
    if let Some(found) = read_store_password(path)? {
        return Ok((found, Origin::Found));
    }
    let mut bytes = Zeroizing::new([0u8; 32]);
    random(bytes.as_mut())?;
    let mut text = Zeroizing::new(String::with_capacity(65));
    for byte in bytes.iter() {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(nibble.into(), 16).expect("a nibble is a hexadecimal digit"));
        }
    }
    text.push('\n');
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    atomic_file::replace(path, Path::new(&beside), text.as_bytes())
        .doing("write the store's password to", path)?;
    text.pop();
    Ok((Secret(text), Origin::Made))
}

const HINT_LOCK: &str = "another zerofsctl is at work there; wait for it and run the same command again";

fn read_store_password(path: &Path) -> Result<Option<Secret>> {
    let file = match OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
    {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
            return Err(Error::refused(format!("the store's password file {} is a link", path.display()))
                .hint("put the file itself in its place"));
        }
        Err(e) => return Err(e).doing("open the store's password file", path),
    };
    let meta = file.metadata().doing("examine", path)?;
    if !meta.is_file() {
        return Err(Error::refused(format!("{} is not a plain file", path.display()))
            .hint("the store's password must be in a plain file; move away what is there"));
    }
    if meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o777;
        return Err(Error::refused(format!(
            "the store's password file {} may be read or changed by others (mode {mode:03o})",
            path.display()
        ))
        .hint(format!("chmod 600 {}", path.display())));
    }
    let secret = read_line(file).doing("read", path)?.ok_or_else(|| {
        Error::refused(format!("the store's password file {} holds no usable password", path.display()))
            .hint("restore it from a backup; without the right password, the store's volumes cannot be read")
    })?;
    check_strength(&secret).map_err(|e| {
        Error::new(Kind::Refused, format!("the store's password file {}: {}", path.display(), e.message()))
            .hint("restore it from a backup; without the right password, the store's volumes cannot be read")
    })?;
    Ok(Some(secret))
}

/// A password from a file: UTF-8, at most 4 KiB, without its last line break. None when it is not that.
pub(crate) fn read_line(file: File) -> io::Result<Option<Secret>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(4097));
    file.take(4097).read_to_end(&mut bytes)?;
    if bytes.len() > 4096 {
        return Ok(None);
    }
    let Ok(text) = std::str::from_utf8(&bytes) else { return Ok(None) };
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    Ok((!text.is_empty()).then(|| Secret::new(text.to_owned())))
}

fn random(bytes: &mut [u8]) -> Result<()> {
    rand::rngs::OsRng.try_fill_bytes(bytes).map_err(|e| {
        bytes.zeroize();
        Error::environment(format!("the kernel gives no random numbers: {e}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn secret(s: &str) -> Secret {
        Secret::new(s.to_owned())
    }

    #[test]
    fn a_check_knows_its_password_and_shows_it_nowhere() {
        let password = secret("correct horse");
        let check = PasswordCheck::new(&password).unwrap();
        assert!(check.verify(&password).unwrap());
        assert!(!check.verify(&secret("correct horsf")).unwrap());
        assert!(check.require(&password).is_ok());
        assert_eq!(check.require(&secret("wrong one")).unwrap_err().kind(), Kind::Usage);
        assert!(check.0.starts_with("$argon2id$v=19$m=7168,t=5,p=1$"), "{}", check.0);
        assert_ne!(PasswordCheck::new(&password).unwrap(), check, "the salt is random");
        let shown = format!("{password:?} {check:?}");
        assert_eq!(shown, "*** PasswordCheck(…)");
        let json = serde_json::to_string(&check).unwrap();
        assert!(!json.contains("horse"));
        assert_eq!(serde_json::from_str::<PasswordCheck>(&json).unwrap(), check);
    }

    #[test]
    fn only_our_own_random_passwords_get_a_quick_check() {
        let dir = tempfile::tempdir().unwrap();
        let (random, _) = store_password(&dir.path().join("p")).unwrap();
        let quick = |s: &Secret| PasswordCheck::new(s).unwrap().0.contains("m=8,");
        assert!(quick(&random));
        assert!(PasswordCheck::new(&random).unwrap().verify(&random).unwrap());
        for weak in ["hunter2hunter2", &"0".repeat(64), &"ab".repeat(32), &"Z".repeat(64)] {
            assert!(!quick(&secret(weak)), "{weak}");
        }
    }

    #[test]
    fn a_check_made_by_another_implementation_verifies() {
        // argon2(1) of Debian: echo -n password | argon2 somesalt -id -t 2 -k 65536 -p 1 -l 24 -e
        let known = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";
        assert!(PasswordCheck(known.to_owned()).verify(&secret("password")).unwrap());
    }

    #[test]
    fn damaged_and_greedy_checks_are_refused_not_wrong() {
        let salt = "c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";
        for bad in [
            "",
            "x",
            "$argon2id$v=19$m=7168,t=5,p=1",
            "$argon2id$v=19$m=7168,t=5,p=1$c29tZXNhbHQ",
            &format!("$argon2d$v=19$m=7168,t=5,p=1${salt}"),
            &format!("$argon2id$v=19$m=4194304,t=5,p=1${salt}"),
            &format!("$argon2id$v=19$m=7168,t=4000000,p=1${salt}"),
            &format!("$scrypt$ln=16${salt}"),
        ] {
            let e = PasswordCheck(bad.to_owned()).verify(&secret("password")).expect_err(bad);
            assert_eq!(e.kind(), Kind::Refused, "{bad}");
            assert!(!e.to_string().contains("c29t"), "{e}");
        }
    }

    #[test]
    fn weak_passwords() {
        for bad in ["", "short", "1234567", "CHANGEME", "line\nbreak inside", "nul\0inside"] {
            let e = check_strength(&secret(bad)).expect_err(bad);
            assert!(
                e.hint_text().is_some()
                    && (bad.is_empty() || bad == "CHANGEME" || !e.to_string().contains(bad))
            );
        }
        for good in ["12345678", "ÄÖÜäöüßẞ", "with \"quotes\" \\ and $HOME"] {
            check_strength(&secret(good)).expect(good);
        }
    }

    #[test]
    fn the_store_password_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/store.password");
        let (made, origin) = store_password(&path).unwrap();
        assert_eq!(origin, Origin::Made);
        assert_eq!(made.expose().len(), 64);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (found, origin) = store_password(&path).unwrap();
        assert_eq!((found == made, origin), (true, Origin::Found));
        let names: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing is left beside it");
    }

    #[test]
    fn racing_makers_agree_on_one_password() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.password");
        let all: Vec<_> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..8).map(|_| s.spawn(|| store_password(&path).unwrap())).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(all.iter().all(|(p, _)| *p == all[0].0));
        assert_eq!(all.iter().filter(|(_, o)| *o == Origin::Made).count(), 1);
    }

    #[test]
    fn a_doubtful_password_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.password");
        let refuse = |what: &str| {
            let before = fs::read(&path).ok();
            let e = store_password(&path).expect_err(what);
            assert_eq!(e.kind(), Kind::Refused, "{what}: {e}");
            assert!(e.hint_text().is_some(), "{what}");
            assert_eq!(fs::read(&path).ok(), before, "{what}");
            e.to_string()
        };
        for (what, content) in [("empty", &b""[..]), ("short", b"1234\n"), ("binary", b"\xff\xfe012345678")] {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            refuse(what);
        }
        fs::write(&path, "a-good-password").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(!refuse("readable by the group").contains("a-good"));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        refuse("a link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refuse("a folder");
    }
}
