//! From our errors to gRPC's. The table is in [`crate::error`]; here is only what CSI wants otherwise.

use tonic::{Code, Status};

use crate::error::{Error, Kind};

/// Why a call is not answered: an error, and a code where the error's kind does not say which.
#[derive(Debug, Clone)]
pub struct Refusal {
    error: Error,
    code: Option<Code>,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal { error, code: None }
    }
}

impl Refusal {
    /// With a code of its own.
    pub fn with(code: Code, error: Error) -> Refusal {
        Refusal { error, code: Some(code) }
    }

    /// A size that cannot be had.
    pub fn out_of_range(message: impl Into<String>) -> Refusal {
        Refusal::with(Code::OutOfRange, Error::usage(message).hint("ask for another size"))
    }

    /// Not offered.
    pub fn unimplemented(what: &str) -> Refusal {
        Refusal::with(
            Code::Unimplemented,
            Error::usage(format!("{what} is not offered")).hint("see the capabilities of the driver"),
        )
    }

    /// The driver is about to end.
    pub fn stopping() -> Refusal {
        Error::new(Kind::Unreachable, "the driver is stopping").hint("try again: the next one goes on").into()
    }

    /// A thread of ours ended in a panic; its message is in the log.
    pub fn panicked() -> Refusal {
        Error::failed("a bug in the driver ended this call").hint("report it, with the driver's log").into()
    }

    /// The error.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// As gRPC tells it: the volume, the step that failed, what happened, and what to do.
    pub fn status(&self) -> Status {
        // What a caller sent may be quoted in it. The hint is ours, and stays whole.
        const LONGEST: usize = 1536;
        let mut text = self.error.to_string();
        if text.len() > LONGEST {
            let cut = (0..=LONGEST).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(cut);
            text.push('…');
        }
        if let Some(hint) = self.error.hint_text() {
            text.push_str("; hint: ");
            text.push_str(hint);
        }
        Status::new(self.code(), text)
    }

    /// The code.
    pub fn code(&self) -> Code {
        if let Some(code) = self.code {
            return code;
        }
        match (self.error.kind(), self.error.step()) {
            // NOT_FOUND means that there is no such volume; a device, keeper or file that is missing on the way is
            // another matter.
            (Kind::NotFound, Some(step)) if step != "claim" => Code::Internal,
            (kind, _) => Code::from_i32(kind.row().grpc),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_code_and_the_text_says_step_and_hint() {
        for (kind, code) in [
            (Kind::Usage, Code::InvalidArgument),
            (Kind::NotFound, Code::NotFound),
            (Kind::Busy, Code::Aborted),
            (Kind::Conflict, Code::AlreadyExists),
            (Kind::Refused, Code::FailedPrecondition),
            (Kind::Environment, Code::FailedPrecondition),
            (Kind::Unreachable, Code::Unavailable),
            (Kind::Interrupted, Code::DeadlineExceeded),
            (Kind::Failed, Code::Internal),
        ] {
            assert_eq!(Refusal::from(Error::new(kind, "x")).code(), code, "{kind:?}");
        }
        let volume = "vol1".parse().unwrap();
        let e =
            Error::new(Kind::NotFound, "the keeper is gone").on(&volume).in_step("replay").hint("do this");
        let status = Refusal::from(e).status();
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(status.message(), "volume vol1: step replay: the keeper is gone; hint: do this");
        let long = Refusal::from(Error::failed("ä".repeat(9000)).hint("do this")).status();
        assert!(long.message().len() <= 2048 && long.message().ends_with("; hint: do this"));
    }
}
