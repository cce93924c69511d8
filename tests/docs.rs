//! What the documents point at is there: files, tests, commands and options.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<(PathBuf, String)> {
    let mut files: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|f| root().join(f)).into();
    files.extend(fs::read_dir(root().join("docs")).unwrap().map(|e| e.unwrap().path()));
    files.retain(|f| f.extension().is_some_and(|e| e == "md"));
    files.into_iter().map(|f| (f.clone(), fs::read_to_string(f).unwrap())).collect()
}

/// The `[text](target)` links of a document.
fn links(text: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("](") {
        let label = &text[text[..at].rfind('[').unwrap() + 1..at];
        let target = &text[at + 2..];
        found.push((label, &target[..target.find(')').unwrap()]));
    }
    found
}

#[test]
fn every_link_leads_somewhere() {
    let mut seen = 0;
    for (file, text) in documents() {
        for (label, target) in links(&text) {
            if target.starts_with("https://") {
                continue;
            }
            let path = file.parent().unwrap().join(target.split('#').next().unwrap());
            assert!(path.exists(), "{}: [{label}]({target})", file.display());
            seen += 1;
        }
    }
    assert!(seen > 30, "only {seen} links: are they still found?");
}

#[test]
fn every_test_that_a_promise_names_is_there() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut seen = 0;
    for (label, target) in links(&readme) {
        let Some(name) = label.strip_prefix('`').and_then(|l| l.strip_suffix('`')) else { continue };
        let source = fs::read_to_string(root().join(target)).unwrap();
        assert!(source.contains(&format!("fn {name}(")), "{target} has no test {name}");
        seen += 1;
    }
    assert!(seen >= 15, "only {seen} tests are named");
}

#[test]
fn every_command_and_option_in_a_document_exists() {
    let definition = zerofsctl::cli::definition();
    let known = |command: &clap::Command| -> Vec<String> {
        command.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)).collect()
    };
    let mut seen = 0;
    for (file, text) in documents() {
        // As it is typed: after a prompt, in backquotes, or in a block.
        for (at, _) in text.match_indices("zerofsctl ") {
            let line = &text[at..];
            let line = line.split(['\n', '`', '|', ')', ';', ':', '#']).next().unwrap();
            let mut words = line.split_whitespace().skip(1);
            let Some(first) = words.clone().next().filter(|w| w.chars().all(|c| c.is_ascii_lowercase()))
            else {
                continue;
            };
            let Some(mut command) = definition.get_subcommands().find(|c| c.get_name() == first) else {
                // Elsewhere it may be a sentence.
                let is_typed = text[..at].ends_with('`') || text[..at].ends_with("$ ");
                assert!(!is_typed, "{}: there is no such command: {line}", file.display());
                continue;
            };
            words.next();
            // `nbd gc`, `csi serve`
            while let Some(next) = words.clone().next()
                && let Some(inner) = command.get_subcommands().find(|c| c.get_name() == next)
            {
                command = inner;
                words.next();
            }
            for option in words.filter_map(|w| w.strip_prefix("--")) {
                let option = option.trim_end_matches([',', '.']);
                let all = [known(command), known(&definition)].concat();
                assert!(all.iter().any(|o| o == option), "{}: {line}", file.display());
            }
            seen += 1;
        }
    }
    assert!(seen >= 25, "only {seen} commands: are they still found?");
}

#[test]
fn every_setting_is_documented() {
    let text = fs::read_to_string(root().join("docs/config.md")).unwrap();
    let source = fs::read_to_string(root().join("src/settings.rs")).unwrap();
    let table = source.split("const KEYS").nth(1).unwrap().split("];").next().unwrap();
    let keys: Vec<&str> =
        table.lines().filter_map(|l| l.trim().strip_prefix("(\"")?.split('"').next()).collect();
    assert!(keys.len() >= 20, "{keys:?}");
    for key in keys {
        assert!(text.contains(&format!("`{key}`")), "{key} is not in docs/config.md");
    }
}

#[test]
fn every_state_is_documented() {
    let text = fs::read_to_string(root().join("docs/recovery.md")).unwrap();
    for file in ["src/cli/list.rs", "src/keeper/control.rs"] {
        let source = fs::read_to_string(root().join(file)).unwrap();
        let states = ["attached", "released", "busy", "interrupted", "broken", "elsewhere"]
            .into_iter()
            .chain(["starting", "ready", "stalled", "fenced", "failed", "stopping"]);
        for state in states.filter(|s| source.contains(&format!("\"{s}\""))) {
            assert!(text.contains(&format!("`{state}`")), "{state} is not in docs/recovery.md");
        }
    }
}

#[test]
fn documents_name_no_place_of_one_machine() {
    for (file, text) in documents() {
        for place in ["/root/", "/work/", "/home/"] {
            assert!(!text.contains(place), "{}: {place}", file.display());
        }
        assert!(Path::new(&file).exists());
    }
}

#[test]
fn every_fault_of_the_driver_before_has_tests_that_are_there() {
    let text = fs::read_to_string(root().join("docs/csi.md")).unwrap();
    let table = text.split("## Faults of the driver before it").nth(1).unwrap();
    let mut faults = 0;
    for line in table.lines().filter(|l| l.starts_with("| ")).skip(2) {
        let tests: Vec<&str> = line.split(" | ").nth(1).unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "{line}");
        for test in tests {
            let (place, name) = test.rsplit_once("::").unwrap_or_else(|| panic!("{test}"));
            // A test program, or a module.
            let module = place.replace("::", "/");
            let files =
                [format!("tests/{module}.rs"), format!("src/{module}.rs"), format!("src/{module}/mod.rs")];
            let sources: Vec<String> =
                files.iter().filter_map(|f| fs::read_to_string(root().join(f)).ok()).collect();
            let is_there = sources.iter().any(|s| {
                s.split(&format!("fn {name}("))
                    .next()
                    .is_some_and(|before| before.len() < s.len() && before.trim_end().ends_with("#[test]"))
            });
            assert!(is_there, "{test}: none of {files:?} has such a test");
        }
        faults += 1;
    }
    assert!(faults >= 21, "only {faults} faults: are they still found?");
}
