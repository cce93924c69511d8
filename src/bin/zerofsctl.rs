fn main() -> std::process::ExitCode {
    let mut args = std::env::args_os().skip(1);
    match (args.next(), args.next(), args.next()) {
        (Some(a), Some(_), Some(dir)) if a == "keeper" => {
            zerofsctl::keeper::main(dir.as_ref(), zerofsctl::keeper::Hooks::default())
        }
        _ => std::process::ExitCode::from(2),
    }
}
