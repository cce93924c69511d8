//! stub
use crate::password::Secret;
/// S3
#[derive(Debug, Clone, Default)]
pub struct S3Settings {
    /// e
    pub endpoint: Option<String>,
    /// r
    pub region: Option<String>,
    /// a
    pub allow_http: Option<bool>,
    /// c
    pub credentials: Option<AwsCredentials>,
}
/// c
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsCredentials {
    /// id
    pub access_key_id: Secret,
    /// k
    pub secret_access_key: Secret,
    /// t
    pub session_token: Option<Secret>,
}
