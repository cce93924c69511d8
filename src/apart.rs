//! Work that may get stuck in the kernel, done in a process of its own.
//!
//! A keeper must always be killable: while one of its threads waits inside the kernel for I/O on the keeper's own device,
//! a SIGKILL does not end the process, its sockets stay open, and the kernel goes on waiting for answers that nobody will
//! give. So whatever may wait for the device (a freeze of its queue, above all) happens in a child that holds none of the
//! keeper's descriptors. A command that is to end such a wait, as `detach --force` is, must not wait itself, either.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::error::{Error, Kind, Result};

/// Runs `work` in a child without this process's descriptors, and waits for it up to `limit`; `what` names it in errors.
///
/// `work` gives an errno on failure. It runs after a fork of a process with threads: it must not log, nor lock anything
/// that another thread may hold (memory allocation is fine).
pub(crate) fn run(what: &str, limit: Duration, work: impl FnOnce() -> Result<(), i32>) -> Result<()> {
    match start(what, work)?.wait(limit, &mut |_| {})? {
        Some(Ok(())) => Ok(()),
        Some(Err(errno)) => {
            Err(Error::failed(format!("cannot {what}: {}", std::io::Error::from_raw_os_error(errno))))
        }
        None => Err(Error::new(
            Kind::Unreachable,
            format!("not done within {:.0} s: {what}", limit.as_secs_f64()),
        )
        .hint("see whether ZeroFS is well: zerofsctl show VOLUME")),
    }
}

/// Work under way in a child. One that is let go of is collected when it ends.
pub(crate) struct Apart {
    child: Pid,
    what: String,
    over: bool,
}

/// Starts what [`run`] runs.
pub(crate) fn start(what: &str, work: impl FnOnce() -> Result<(), i32>) -> Result<Apart> {
    // SAFETY: the child allocates at most, which the C library keeps usable across a fork, opens descriptors of its own,
    // and ends by _exit, so that nothing of the parent's is torn down.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            // SAFETY: plain system calls; whatever these descriptors belong to is not used again in this process.
            unsafe {
                // Whoever reads our output must not wait for the child, either.
                if libc::close_range(0, libc::c_uint::MAX, 0) != 0 {
                    // Before Linux 5.9.
                    (0..65_536).for_each(|fd| {
                        libc::close(fd);
                    });
                }
                let code = match work() {
                    Ok(()) => 0,
                    Err(errno) => errno.clamp(1, 250),
                };
                libc::_exit(code)
            }
        }
        Err(e) => return Err(Error::environment(format!("cannot start a process to {what}: {e}"))),
    };
    Ok(Apart { child, what: what.to_owned(), over: false })
}

impl Apart {
    /// What came of it, success or an errno; none after that time without an end. `waits` is told now and then how long
    /// it has been.
    pub(crate) fn wait(
        &mut self,
        limit: Duration,
        waits: &mut dyn FnMut(Duration),
    ) -> Result<Option<Result<(), i32>>> {
        let begun = Instant::now();
        loop {
            match waitpid(self.child, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
                ended => {
                    self.over = true;
                    return match ended {
                        Ok(WaitStatus::Exited(_, 0)) => Ok(Some(Ok(()))),
                        Ok(WaitStatus::Exited(_, errno)) => Ok(Some(Err(errno))),
                        other => {
                            Err(Error::failed(format!("the process to {} ended with {other:?}", self.what)))
                        }
                    };
                }
            }
            let elapsed = begun.elapsed();
            if elapsed >= limit {
                return Ok(None);
            }
            let long = elapsed > Duration::from_millis(200);
            if long {
                waits(elapsed);
            }
            std::thread::sleep(Duration::from_millis(if long { 20 } else { 1 }));
        }
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        if !self.over {
            let child = self.child;
            let reaper = std::thread::Builder::new().name("apart".into()).stack_size(64 * 1024);
            let _ = reaper.spawn(move || waitpid(child, None));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_succeeds_fails_or_takes_too_long_and_has_no_descriptor_of_ours() {
        use std::os::fd::AsRawFd;
        let long = Duration::from_secs(20);
        let open = std::fs::File::open("/dev/null").unwrap();
        let fds = [1, 2, open.as_raw_fd()];
        let gone = move || {
            // SAFETY: asks about a number.
            let is_open = |fd: &i32| unsafe { libc::fcntl(*fd, libc::F_GETFD) } != -1;
            if fds.iter().any(is_open) { Err(libc::EEXIST) } else { Ok(()) }
        };
        run("look", long, gone).unwrap();
        let e = run("fail", long, || Err(libc::ENOSPC)).unwrap_err();
        assert_eq!(e.message(), "cannot fail: No space left on device (os error 28)");
        let slow = || {
            std::thread::sleep(Duration::from_millis(300));
            Ok(())
        };
        let e = run("sleep", Duration::from_millis(20), slow).unwrap_err();
        assert_eq!(e.kind(), Kind::Unreachable);
    }
}
