use super::*;

type Env = &'static [(&'static str, &'static str)];

fn try_load(texts: &[(&str, bool)], env: Env) -> Result<(Settings, Vec<String>)> {
    let mut documents = Documents::default();
    for (text, config) in texts {
        documents.add_text(text, if *config { "c.yaml" } else { "s.yaml" }, *config)?;
    }
    documents
        .settings(None, &|name| env.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value)))
}

fn load_config(text: &str) -> Result<Settings> {
    try_load(&[(text, true)], &[]).map(|(settings, _)| settings)
}

const MANIFESTS: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata:
  name: zerofs-config
  namespace: zerofs
data:
  zerofsImage: registry.example/zerofs:2.3.0
  storageURL: s3://vols/csi
  encryptionPasswordSecretName: zerofs-encryption
  awsCredentialsSecretName: zerofs-aws
  awsEndpoint: http://minio.minio.svc:9000/
  awsDefaultRegion: eu-central-1
  awsAllowHTTP: "true"
  cacheDir: /var/cache/zerofs/
  cacheDiskSizeGB: "1.5"
  cacheMemorySizeGB: "0.25"
  lsmL0MaxSsts: "32"
  lsmMaxUnflushedGB: "0.5"
  lsmMaxConcurrentCompactions: "4"
  lsmFlushIntervalSecs: "5"
  filesystemMaxSizeGB: "200.0"
  rustLog: zerofs=debug,slatedb=info
  podReadyTimeoutSeconds: "300"
  cpuRequest: 500m
  cpuLimit: "2"
  memoryRequest: 512Mi
  memoryLimit: 1Gi
  envoyEnabled: "true"
  envoyImage: envoyproxy/envoy:distroless-v1.30
  envoyConfigMapRef: envoy-config
---
apiVersion: v1
kind: Secret
metadata: {name: zerofs-encryption}
type: Opaque
data:
  password: aHVudGVyMjItaHVudGVyMjI=
---
apiVersion: v1
kind: Secret
metadata: {name: zerofs-aws}
stringData:
  username: AKIAHUNTER22
  password: aws-hunter22
  AWS_SESSION_TOKEN: token-hunter22
"#;

#[test]
fn whole_manifests() {
    let (s, warnings) = try_load(&[(MANIFESTS, true)], &[]).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(s.storage_url.as_ref().unwrap().as_str(), "s3://vols/csi");
    assert_eq!(s.encryption_password.as_ref().unwrap().expose(), "hunter22-hunter22");
    assert_eq!(s.s3.endpoint.as_deref(), Some("http://minio.minio.svc:9000"));
    assert_eq!(s.s3.region.as_deref(), Some("eu-central-1"));
    assert_eq!(s.s3.allow_http, Some(true));
    let keys = s.s3.credentials.as_ref().unwrap();
    assert_eq!(keys.access_key_id.expose(), "AKIAHUNTER22");
    assert_eq!(keys.secret_access_key.expose(), "aws-hunter22");
    assert_eq!(keys.session_token.as_ref().unwrap().expose(), "token-hunter22");
    assert_eq!(
        s.cache,
        CacheSettings { dir: Some("/var/cache/zerofs".into()), disk_gb: Some(1.5), memory_gb: Some(0.25) }
    );
    assert_eq!(
        s.lsm,
        LsmSettings {
            l0_max_ssts: Some(32),
            max_unflushed_gb: Some(0.5),
            max_concurrent_compactions: Some(4),
            flush_interval_secs: Some(5),
        }
    );
    assert_eq!(s.filesystem_max_size_gb, Some(200.0));
    assert_eq!(s.rust_log.as_deref(), Some("zerofs=debug,slatedb=info"));
    assert_eq!(s.resources.cpu_request.as_ref().unwrap().millis(), 500);
    assert_eq!(s.resources.memory_limit.as_ref().unwrap().units(), 1 << 30);
    assert_eq!(s.pod.ready_timeout, Duration::from_secs(300));
    assert!(s.pod.envoy_enabled);
    assert_eq!(s.pod.zerofs_image.as_deref(), Some("registry.example/zerofs:2.3.0"));
}

#[test]
fn nothing_and_empty_values_are_the_defaults() {
    for text in ["", "---\n", "{}", "storageURL: \"\"\nawsEndpoint:\nrustLog: ~\n", "# only a comment\n"] {
        let s = load_config(text).expect(text);
        assert_eq!(s.storage_url, None, "{text}");
        assert!(s.encryption_password.is_none() && s.s3.credentials.is_none() && s.s3.endpoint.is_none());
        assert_eq!((s.cache, s.lsm), (CacheSettings::default(), LsmSettings::default()));
        assert_eq!((s.pod.ready_timeout.as_secs(), s.pod.envoy_enabled), (120, false));
    }
}

#[test]
fn a_plain_map_may_leave_quotes_out_where_nothing_changes() {
    let s = load_config(
        "storageURL: file:///srv/store\nawsAllowHTTP: true\ncacheDiskSizeGB: 1\ncacheMemorySizeGB: 0.1\n\
         lsmL0MaxSsts: 16\npodReadyTimeoutSeconds: 60\ncpuLimit: 2\nmemoryLimit: 1e9\ncpuRequest: .5\n",
    )
    .unwrap();
    assert_eq!(s.s3.allow_http, Some(true));
    assert_eq!((s.cache.disk_gb, s.cache.memory_gb, s.lsm.l0_max_ssts), (Some(1.0), Some(0.1), Some(16)));
    assert_eq!(s.resources.memory_limit.unwrap().units(), 1_000_000_000);
    assert_eq!(s.resources.cpu_request.unwrap().millis(), 500);
}

#[test]
fn lists_of_manifests_and_unrelated_ones() {
    let list = "kind: List\napiVersion: v1\nitems:\n- kind: ConfigMap\n  data: {storageURL: 'file:///a/b'}\n- kind: Namespace\n";
    let (s, warnings) = try_load(&[(list, true)], &[]).unwrap();
    assert_eq!(s.storage_url.unwrap().as_str(), "file:///a/b");
    assert!(warnings.len() == 1 && warnings[0].contains("Namespace"), "{warnings:?}");
}

/// Each fails with all these words in its error or hint, and without the secret.
#[test]
fn mistakes_in_the_config() {
    let long = format!("rustLog: {}", "x".repeat(2 << 20));
    let cases: &[(&str, &[&str])] = &[
        ("storageUrl: s3://zerofs", &["unknown key \"storageUrl\"", "did you mean storageURL?"]),
        ("storage_url: s3://zerofs", &["did you mean storageURL?"]),
        ("cacheSizeGB: '1'", &["cacheSizeGB", "did you mean cacheDiskSizeGB?"]),
        ("lsmL0MaxSst: '1'", &["did you mean lsmL0MaxSsts?"]),
        ("fancy: '1'", &["unknown key \"fancy\"", "the known keys are zerofsImage"]),
        ("encryptionPassword: hunter22", &["do not belong here", "encryptionPasswordSecretName"]),
        ("awsSecretAccessKey: hunter22", &["do not belong here", "awsCredentialsSecretName"]),
        ("apiVersion: v1\ndata: {}", &["kind: ConfigMap"]),
        ("storageURL: [s3://zerofs]", &["storageURL is a list"]),
        ("cacheDir: {a: b}", &["cacheDir is a map"]),
        ("storageURL: 7", &["storageURL is a number without quotes", "quotes"]),
        ("zerofsImage: 1.10", &["zerofsImage is a number without quotes"]),
        ("cacheDir: yes\nawsDefaultRegion: true", &["awsDefaultRegion is true or false without quotes"]),
        ("cacheDiskSizeGB: true", &["cacheDiskSizeGB is true or false"]),
        ("awsAllowHTTP: 1", &["awsAllowHTTP is a number"]),
        ("awsAllowHTTP: maybe", &["c.yaml: awsAllowHTTP: \"maybe\" is not true or false"]),
        ("cacheDiskSizeGB: '0'", &["cacheDiskSizeGB", "above 0"]),
        ("cacheDiskSizeGB: '-1'", &["cacheDiskSizeGB"]),
        ("cacheDiskSizeGB: 1Gi", &["\"1Gi\" is not a number of gigabytes"]),
        ("cacheDiskSizeGB: .inf", &["cacheDiskSizeGB"]),
        ("cacheDiskSizeGB: '.'", &["cacheDiskSizeGB"]),
        ("cacheMemorySizeGB: 1e99", &["cacheMemorySizeGB"]),
        ("lsmL0MaxSsts: 1.5", &["lsmL0MaxSsts", "whole number"]),
        ("lsmL0MaxSsts: '+5'", &["whole number"]),
        ("lsmFlushIntervalSecs: '4'", &["lsmFlushIntervalSecs", "from 5"]),
        ("podReadyTimeoutSeconds: 2m", &["podReadyTimeoutSeconds", "\"2m\""]),
        ("filesystemMaxSizeGB: lots", &["filesystemMaxSizeGB", "\"lots\""]),
        ("deleteDataGracePeriod: 24", &["deleteDataGracePeriod is a number without quotes", "quotes"]),
        ("deleteDataGracePeriod: '24'", &["c.yaml: deleteDataGracePeriod: \"24\"", "\"24h\""]),
        ("deleteDataGracePeriod: '-1h'", &["deleteDataGracePeriod", "\"-1h\" is not a time"]),
        ("deleteDataGracePeriod: 500ms", &["deleteDataGracePeriod", "whole seconds"]),
        ("deleteDataGracePeriod: 11years", &["deleteDataGracePeriod", "ten years"]),
        ("cpuRequest: 1core", &["cpuRequest", "unit is unknown"]),
        ("memoryLimit: 1GB", &["memoryLimit", "unit is unknown"]),
        ("memoryLimit: -1", &["memoryLimit", "negative"]),
        ("memoryLimit: '0'", &["memoryLimit is zero"]),
        ("cpuRequest: 2\ncpuLimit: 1999m", &["cpuLimit", "less than what is requested (2)"]),
        ("rustLog: 'a=b=c'", &["rustLog", "log filter"]),
        ("cacheDir: tmp", &["cacheDir", "absolute"]),
        ("cacheDir: /a/../b", &["cacheDir"]),
        ("zerofsImage: 'two words'", &["zerofsImage", "image reference"]),
        ("envoyConfigMapRef: 'Hunter22!'", &["envoyConfigMapRef", "metadata.name"]),
        (
            "encryptionPasswordSecretName: 'hunter22 hunter22'",
            &["encryptionPasswordSecretName", "name of a Kubernetes object"],
        ),
        (
            "encryptionPasswordSecretName: enc",
            &["names the Secret enc, which was not given", "--secret FILE"],
        ),
        (
            "storageURL: s3://zerofs\nawsCredentialsSecretName: aws",
            &["names the Secret aws, which was not given"],
        ),
        ("storageURL: gs://zerofs", &["c.yaml: storageURL: ", "s3://BUCKET/PREFIX and file://"]),
        ("storageURL: s3://u:hunter22@zerofs", &["storageURL", "user name or password"]),
        ("awsEndpoint: minio:9000", &["awsEndpoint", "https://"]),
        ("awsEndpoint: https://u:hunter22@minio", &["awsEndpoint", "user name"]),
        ("awsEndpoint: 'https://minio:99999'", &["awsEndpoint", "port"]),
        ("awsEndpoint: 'https://'", &["awsEndpoint", "host name"]),
        ("awsEndpoint: 'https://[::1'", &["awsEndpoint"]),
        ("awsEndpoint: ftp://minio", &["awsEndpoint"]),
        (
            "storageURL: s3://zerofs\nawsEndpoint: http://minio:9000",
            &["awsEndpoint is http://", "awsAllowHTTP: \"true\""],
        ),
        ("awsDefaultRegion: 'eu central'", &["awsDefaultRegion"]),
        ("storageURL: s3://aaa\nstorageURL: s3://bbb", &["the key storageURL is given twice"]),
        ("storageURL: s3://aaa\n---\nstorageURL: s3://bbb", &["two sets of settings"]),
        (
            "kind: ConfigMap\ndata: {cacheDiskSizeGB: 1}",
            &["ConfigMap takes only texts", "cacheDiskSizeGB: \"…\""],
        ),
        ("kind: ConfigMap\nDATA: {}", &["DATA", "under data:"]),
        ("kind: ConfigMap\ndata: text", &["data of the ConfigMap is a text"]),
        ("kind: 7", &["kind of a manifest"]),
        ("- a\n- b", &["a document is a list"]),
        ("just text hunter22", &["a document is a text"]),
        ("a: b: hunter22", &["not valid YAML", "line 1"]),
        ("\tstorageURL: hunter22", &["not valid YAML"]),
        ("storageURL: !hunter22 hunter22", &["not valid YAML"]),
        ("? [a]\n: b", &["a key is not a text"]),
        ("<<: {storageURL: s3://zerofs}", &["unknown key \"<<\""]),
        ("kind: Secret\nstringData: {password: hunter22}", &["no valid metadata.name"]),
        (
            "kind: Secret\nmetadata: {name: a}\ndata: {password: 'hunter22!'}",
            &["Secret a: key password is not valid base64", "stringData"],
        ),
        (
            "kind: Secret\nmetadata: {name: a}\ndata: {password: 12}",
            &["Secret a: key password is not a text"],
        ),
        ("kind: Secret\nmetadata: {name: a}\nhunter22: x", &["a Secret has a field"]),
        (
            "kind: Secret\nmetadata: {name: a}\n---\nkind: Secret\nmetadata: {name: a}",
            &["two Secrets with the name a"],
        ),
        (long.as_str(), &["rustLog"]),
    ];
    for (text, words) in cases {
        let head = &text[..text.len().min(80)];
        let e = load_config(text).map(|_| ()).expect_err(head);
        assert_eq!(e.kind(), Kind::Usage, "{head}: {e}");
        let all = format!("{e}\nhint: {}", e.hint_text().unwrap_or_else(|| panic!("no hint: {e}")));
        for word in *words {
            assert!(all.contains(word), "{head}: {word:?} is not in: {all}");
        }
        assert!(!all.to_lowercase().contains("hunter22") && all.len() < 900, "{head}: {all}");
    }
}

#[test]
fn secrets_by_name_and_what_is_wrong_with_them() {
    let config = "encryptionPasswordSecretName: enc\nawsCredentialsSecretName: aws\nstorageURL: s3://zerofs";
    let enc = "kind: Secret\nmetadata: {name: enc}\nstringData: {password: hunter22-enc}";
    let aws = "kind: Secret\nmetadata: {name: aws}\nstringData: {AWS_ACCESS_KEY_ID: id-hunter22, AWS_SECRET_ACCESS_KEY: sk-hunter22}";
    let (s, warnings) = try_load(&[(config, true), (enc, false), (aws, false)], &[]).unwrap();
    assert!(warnings.is_empty());
    assert_eq!(s.encryption_password.unwrap().expose(), "hunter22-enc");
    assert_eq!(s.s3.credentials.unwrap().session_token, None);

    let failing = [
        (enc.replace("password", "Password"), "Secret enc has no key password"),
        (enc.replace("hunter22-enc", "h22"), "Secret enc: the encryption password has fewer than 8"),
        (enc.replace("hunter22-enc", "CHANGEME"), "placeholder"),
        (enc.replace("kind: Secret", "kind: ConfigMap"), "a ConfigMap was given to --secret"),
        (enc.replace("kind: Secret\n", ""), "not a Kubernetes manifest"),
        (enc.replace("password: ", "password: hunter22, password: "), "the key password is given twice"),
    ];
    for (text, word) in failing {
        let e = try_load(&[(config, true), (&text, false), (aws, false)], &[]).map(|_| ()).expect_err(word);
        assert!(e.to_string().contains(word) && e.hint_text().is_some(), "{word}: {e}");
        assert!(!e.to_string().contains("hunter22"), "{e}");
    }
    for (from, to, word) in [
        ("AWS_ACCESS_KEY_ID", "key", "neither key AWS_ACCESS_KEY_ID nor username"),
        ("AWS_SECRET_ACCESS_KEY", "key", "neither key AWS_SECRET_ACCESS_KEY nor password"),
        ("sk-hunter22", "'sk hunter22'", "secret access key contains a blank"),
    ] {
        let text = aws.replace(from, to);
        let e = try_load(&[(config, true), (enc, false), (&text, false)], &[]).map(|_| ()).expect_err(word);
        assert!(e.to_string().contains(word) && !e.to_string().contains("hunter22"), "{word}: {e}");
    }

    let newline = "kind: Secret\nmetadata: {name: enc}\ndata: {password: aHVudGVyMjItaHVudGVyMjIK}\nstringData: {other: x}";
    let (s, warnings) =
        try_load(&[("encryptionPasswordSecretName: enc", true), (newline, false), (aws, false)], &[])
            .unwrap();
    assert_eq!(s.encryption_password.unwrap().expose(), "hunter22-hunter22");
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].contains("line break") && warnings[1].contains("Secret aws is not used"),
        "{warnings:?}"
    );
    assert!(!format!("{warnings:?}").contains("hunter22"));
}

#[test]
fn the_environment_comes_after_named_secrets() {
    let s3 = "storageURL: s3://zerofs";
    let env: Env = &[
        ("ZEROFS_ENCRYPTION_PASSWORD", "env-hunter22"),
        ("AWS_ACCESS_KEY_ID", "env-id"),
        ("AWS_SECRET_ACCESS_KEY", "env-hunter22"),
        ("AWS_SESSION_TOKEN", ""),
    ];
    let (s, _) = try_load(&[(s3, true)], env).unwrap();
    assert_eq!(s.encryption_password.unwrap().expose(), "env-hunter22");
    let keys = s.s3.credentials.unwrap();
    assert_eq!((keys.access_key_id.expose(), keys.session_token), ("env-id", None));

    let (s, _) = try_load(&[(MANIFESTS, true)], env).unwrap();
    assert_eq!(s.encryption_password.unwrap().expose(), "hunter22-hunter22");
    assert_eq!(s.s3.credentials.unwrap().access_key_id.expose(), "AKIAHUNTER22");

    // Named, not given, but in the environment: a node's way of handing them over.
    let named = "storageURL: s3://zerofs\nencryptionPasswordSecretName: enc\nawsCredentialsSecretName: aws";
    assert!(try_load(&[(named, true)], env).is_ok());

    // Half a pair matters only to S3.
    let half: Env = &[("AWS_ACCESS_KEY_ID", "env-id")];
    let e = try_load(&[(s3, true)], half).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("AWS_SECRET_ACCESS_KEY is not"), "{e}");
    assert!(try_load(&[("storageURL: file:///a/b", true)], half).is_ok());

    let short: Env = &[("ZEROFS_ENCRYPTION_PASSWORD", "h22")];
    let e = try_load(&[], short).map(|_| ()).unwrap_err();
    assert!(e.to_string().starts_with("ZEROFS_ENCRYPTION_PASSWORD: ") && e.hint_text().is_some(), "{e}");
    let both: Env =
        &[("ZEROFS_ENCRYPTION_PASSWORD", "env-hunter22"), ("ZEROFS_ENCRYPTION_PASSWORD_FILE", "/x")];
    let e = try_load(&[], both).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("both") && !e.to_string().contains("hunter22"), "{e}");
    let missing: Env = &[("ZEROFS_ENCRYPTION_PASSWORD_FILE", "/nonexistent/file")];
    let e = try_load(&[], missing).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("/nonexistent/file") && e.hint_text().is_some(), "{e}");
}

#[test]
fn files_and_their_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let write = |name: &str, text: &[u8], mode: u32| {
        std::fs::write(path(name), text).unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
        path(name)
    };
    let run = |config: &Path, secrets: &[PathBuf], file: Option<&Path>| {
        let env =
            |name: &str| (name == "ZEROFS_ENCRYPTION_PASSWORD_FILE").then_some(file?.as_os_str().to_owned());
        load(&Sources { config: Some(config), secrets, storage_url: None, env: &env })
    };
    let config = write("c.yaml", b"encryptionPasswordSecretName: enc", 0o644);
    let secret = "kind: Secret\nmetadata: {name: enc}\nstringData: {password: hunter22-enc}";
    let private = write("s.yaml", secret.as_bytes(), 0o600);
    let open = write("open.yaml", secret.as_bytes(), 0o644);

    let (s, warnings) = run(&config, std::slice::from_ref(&private), None).unwrap();
    assert!(s.encryption_password.is_some() && warnings.is_empty(), "{warnings:?}");
    let (_, warnings) = run(&config, std::slice::from_ref(&open), None).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("chmod 600"), "{warnings:?}");

    let all = write("all.yaml", MANIFESTS.as_bytes(), 0o600);
    assert!(run(&all, std::slice::from_ref(&all), None).is_ok(), "one file may be given as both");

    let line = write("password", b"file-hunter22\n", 0o644);
    let (s, warnings) = run(&config, &[], Some(&line)).unwrap();
    assert_eq!(s.encryption_password.unwrap().expose(), "file-hunter22");
    assert!(warnings.len() == 1 && warnings[0].contains("chmod 600"), "{warnings:?}");

    for (what, config) in [
        ("there is no file", path("missing.yaml")),
        ("is a folder", dir.path().to_owned()),
        ("more than 1 MiB", write("big.yaml", &vec![b'#'; (1 << 20) + 1], 0o600)),
        ("not UTF-8", write("binary.yaml", b"\xff\xfe\x00hunter22", 0o600)),
        ("more than 1 MiB", PathBuf::from("/dev/zero")),
    ] {
        let e = run(&config, &[], None).map(|_| ()).expect_err(what);
        assert!(e.to_string().contains(what) && e.hint_text().is_some(), "{what}: {e}");
    }
    let empty = write("empty", b"", 0o600);
    let e = run(&config, &[], Some(&empty)).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("holds no password"), "{e}");
}

#[test]
fn yaml_bombs_end_in_an_error() {
    let mut laughs = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for i in 1..12 {
        let before = format!("*a{}", i - 1);
        laughs += &format!("a{i}: &a{i} [{}]\n", [before.as_str(); 10].join(","));
    }
    let large = format!("a: &a {}\nb: [{}]", "x".repeat(500_000), vec!["*a"; 50_000].join(","));
    let empty = format!("a: &a [{}]\nb: [{}]", vec!["~"; 1000].join(","), vec!["*a"; 100_000].join(","));
    let deep = format!("a: {}", "[".repeat(200_000));
    let list = "- ".repeat(500_000);
    let keys = "? ".repeat(500_000);
    let tags = "!a ".repeat(300_000);
    let anchors = (0..80_000).map(|i| format!("k{i}: &b{i}\n")).collect::<String>();
    for (what, text) in [
        ("laughs", laughs),
        ("large", large),
        ("empty", empty),
        ("deep", deep),
        ("list", list),
        ("keys", keys),
        ("tags", tags),
        ("anchors", anchors),
    ] {
        let started = std::time::Instant::now();
        let e = load_config(&text).map(|_| ()).expect_err(what);
        assert_eq!(e.kind(), Kind::Usage, "{what}: {e}");
        assert!(started.elapsed() < Duration::from_secs(20), "{what} took {:?}", started.elapsed());
    }
}

#[test]
fn no_secret_in_any_debug_output() {
    let (s, warnings) = try_load(&[(MANIFESTS, true)], &[]).unwrap();
    let all = format!("{s:?} {s:#?} {warnings:?}").to_lowercase();
    assert!(!all.contains("hunter22"), "{all}");
    assert!(all.contains("***"));
}

#[test]
fn base64_is_strict_about_everything_but_line_breaks() {
    for (text, plain) in
        [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9v\n YmFy ", "foobar")]
    {
        assert_eq!(base64(text).expect(text).as_str(), plain);
    }
    for bad in ["Zg", "Zg=", "Zg===", "Z", "Zh==", "Zm9=", "=", "====", "Zm=v", "Zm9v!", "_-==", "/w=="] {
        assert!(base64(bad).is_none(), "{bad}");
    }
}

proptest::proptest! {
    #[test]
    fn reading_never_panics(text in "\\PC{0,60}|([a-zA-Z]{0,12}: ?[\"'\\[\\]{}&*!|>%@`a-z0-9 \n-]{0,20}\n){0,5}") {
        let _ = load_config(&text);
        let _ = try_load(&[(&text, false)], &[]);
        let _ = base64(&text);
    }

    #[test]
    fn values_never_panic(key in 0usize..KEYS.len(), value in "\\PC{0,30}") {
        let text = format!("{}: {}", KEYS[key].0, serde_json::to_string(&value).unwrap());
        if let Err(e) = load_config(&text) {
            proptest::prop_assert_eq!(e.kind(), Kind::Usage);
            proptest::prop_assert!(!e.to_string().contains('\n'));
        }
    }
}
