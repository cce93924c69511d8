use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use clap::Args;

use crate::cli::Context;
use crate::error::{Doing, Error, Kind, Result};
use crate::report::Report;
use crate::report::nbd::{self, ExportInfo};
use crate::zerofs::nbd::Inquiry;
use crate::zerofs::sock;

const GIVE_A_SOCKET: &str = "give the server's unix socket; zerofsctl show VOLUME names it";

/// Ask an NBD server on a unix socket for its exports, their sizes and what it can do
///
/// It stays in the handshake: no export is opened. zerofsctl show names the socket of a volume.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl nbd info /run/zerofsctl/volumes/vol1/nbd.sock
  zerofsctl nbd info ./nbd.sock --export disk -o json")]
pub struct InfoArgs {
    /// The server's unix socket
    socket: PathBuf,
    /// Only this export; otherwise those that the server lists
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
}

pub fn run(args: &InfoArgs, context: &Context) -> Result<Report> {
    let path = context.cwd.join(&args.socket);
    let name = path.file_name().and_then(|n| n.to_str());
    let (Some(folder), Some(name)) = (path.parent(), name) else {
        return Err(Error::usage(format!("{} names no socket", path.display())).hint(GIVE_A_SOCKET));
    };
    // A connect to anything else fails as if nobody listened. What cannot be looked at, the connect tells.
    if std::fs::metadata(&path).is_ok_and(|meta| !meta.file_type().is_socket()) {
        return Err(Error::usage(format!("{} is no socket", path.display())).hint(GIVE_A_SOCKET));
    }
    let ask = || -> Result<Inquiry<_>> {
        let stream = sock::connect(folder, name).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::new(Kind::NotFound, format!("there is no socket {}", path.display()))
                    .hint("see the sockets of a volume: zerofsctl show VOLUME")
            }
            std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::TimedOut => {
                Error::new(Kind::Unreachable, format!("nobody answers on {}: {e}", path.display()))
                    .hint("look whether its server runs: zerofsctl list")
            }
            _ => match Err::<(), _>(e).doing("connect to", &path) {
                Err(e) => e.hint(GIVE_A_SOCKET),
                Ok(()) => Error::failed("a connect failed without an error"),
            },
        })?;
        Inquiry::start(stream)
    };
    let mut inquiry = ask()?;
    let listed = inquiry.list()?;
    let names = match (&args.export, &listed) {
        (Some(name), _) => vec![name.clone()],
        (None, Some(names)) => names.clone(),
        // What a server calls its default.
        (None, None) => vec![String::new()],
    };
    let structured = inquiry.structured()?;
    let mut exports = Vec::new();
    for name in names {
        let export = match inquiry.info(&name) {
            Ok(export) => export,
            Err(e) if e.kind() == Kind::NotFound && args.export.is_none() && listed.is_none() => {
                return Err(e.hint(
                    "the server does not list its exports: name one with --export, such as --export disk",
                ));
            }
            Err(e) if e.kind() == Kind::NotFound => {
                return Err(e.hint(format!("see what it has: zerofsctl nbd info {}", path.display())));
            }
            Err(e) => return Err(e),
        };
        let block_status = structured && inquiry.has_block_status(&name)?;
        exports.push(ExportInfo { name, export, block_status });
    }
    Ok(nbd::info(&path, listed.is_some(), structured, &exports))
}
