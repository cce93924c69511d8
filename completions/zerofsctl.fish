# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_zerofsctl_global_optspecs
    string join \n o/output= state-dir= run-dir= zerofs-bin= v/verbose log-format= h/help V/version
end

function __fish_zerofsctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_zerofsctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_zerofsctl_using_subcommand
    set -l cmd (__fish_zerofsctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -s V -l version -d 'Print version'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "attach" -d 'Attach a volume and mount it; a new one is made and formatted'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "detach" -d 'Unmount a volume, take its device away, and stop its ZeroFS'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "list" -d 'List the volumes of this node and of a store'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "show" -d 'Show all of one volume: processes, sockets, device, mounts, journal'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "resize" -d 'Grow a volume, its device and its filesystem; online if it is attached'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "fsck" -d 'Check the filesystem of a detached volume; repair it with --repair'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "recover" -d 'Settle what killed commands and killed keepers left'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "watch" -d 'Start the next keeper of each volume whose keeper died'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "nbd" -d 'See, watch and tidy up the kernel\'s NBD devices; ask an NBD server what it has'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "gc-s3" -d 'Find and delete what deleted volumes left in the bucket, and nothing else'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "volume" -d 'Look at the catalog in the bucket, and take records out of it'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "zerofs" -d 'Tell what is known of ZeroFS itself'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "demo" -d 'Try it out: attach, write, detach, compare, resize, check, clean up'
complete -c zerofsctl -n "__fish_zerofsctl_needs_command" -f -a "csi" -d 'Serve CSI, for Kubernetes and other orchestrators'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l target -d 'The folder to mount it at, or with --block the link to make; an empty or new one' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l size -d 'The size of a new volume, such as 10Gi [default: 1Gi]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l fs -d 'The filesystem of a new volume: ext4, xfs or btrfs [default: ext4]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l mount-option -d 'An option for mount(8), such as noatime; repeatable' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l transport -d 'How the block device is made: nbd (by the kernel), fuse, or auto, which takes nbd where it works' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l path -d 'For nbd: guarded (a crash of ZeroFS is only a pause) or direct (it fails the device)' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l reconnect-timeout -d 'For nbd: how long the kernel holds I/O while no keeper serves the device' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l runtime -d 'Where ZeroFS runs: process' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l io-timeout -d 'Let I/O fail when ZeroFS is away this long [default: it waits]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l replay-log -d 'Room for writes that ZeroFS has not flushed yet' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l read-only -d 'Never format, repair or write'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l block -d 'Link the raw block device at the target, and mount nothing'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l take-over -d 'Take the volume from a node that is gone for good: what that had not flushed is lost'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -l dry-run -d 'Print the plan and change nothing'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand attach" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l stop-timeout -d 'How long ZeroFS may take to flush and stop, such as 90s or 10m' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l all -d 'Every volume of this node'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l force -d 'After that time fail the device, and kill ZeroFS'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -l dry-run -d 'Print the plan and change nothing'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand detach" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand list" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand show" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -l dry-run -d 'Print the plan and change nothing'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand resize" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l read-data -d 'Also read the data: all, part N of T, or the first P percent' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l repair -d 'Repair what is found; asks for the volume\'s name first'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l yes -d 'Repair without asking'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -l dry-run -d 'Print the plan and change nothing'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand fsck" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand recover" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand watch" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -f -a "list" -d 'List the connected NBD devices, who uses and serves each, and what it is to us'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -f -a "gc" -d 'Disconnect NBD devices of ours that leaked; a plan unless --yes is given'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -f -a "info" -d 'Ask an NBD server on a unix socket for its exports, their sizes and what it can do'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and not __fish_seen_subcommand_from list gc info watch" -f -a "watch" -d 'Print what becomes of NBD devices, a line each, until Ctrl-C'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -l all -d 'Also devices that are not connected'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -l check -d 'Exit with code 3 when a device of ours is leaked, 4 when it is not known whether one is'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from list" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l older-than -d 'How long a leak must be known, by an earlier gc or watch, such as 90s or 5m' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l pause -d 'How long to wait between the two looks' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -l yes -d 'Disconnect them, without asking'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from gc" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -l export -d 'Only this export; otherwise those that the server lists' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from info" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -l interval -d 'How long to wait between two looks; lost connections are told at once' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand nbd; and __fish_seen_subcommand_from watch" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -f -a "scan" -d 'Give every volume in the bucket a verdict; change nothing'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -f -a "mark" -d 'Mark orphans, or the volumes that you name, for deletion; a sweep deletes them later'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -f -a "sweep" -d 'Delete the volumes that were marked long enough ago and are still orphans'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -f -a "restore" -d 'Take the mark of a volume away, and keep it'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and not __fish_seen_subcommand_from scan mark sweep restore status" -f -a "status" -d 'List the volumes that are marked or being deleted, and when they are due'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l metrics-file -d 'Write metrics of this run there, for Prometheus: in the folder of node_exporter\'s textfile collector, ending in .prom' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l context -d 'A Kubernetes cluster to ask, by its context in the kubeconfig; repeatable, and all must answer. Without one: the current context, or the cluster around this pod' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l gone-cluster -d 'A cluster that is gone for good: nothing in it refers to its volumes any more; repeatable' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l min-age -d 'A volume whose record was written within this time may still be in the making' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l quiet -d 'Whoever wrote to a volume within this time may still be at it' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -l no-kubernetes -d 'Ask no cluster: volumes of a cluster are then never orphans'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from scan" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l max-delete -d 'Mark nothing at all if it would be more than so many volumes, or so many of a hundred' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l metrics-file -d 'Write metrics of this run there, for Prometheus: in the folder of node_exporter\'s textfile collector, ending in .prom' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l context -d 'A Kubernetes cluster to ask, by its context in the kubeconfig; repeatable, and all must answer. Without one: the current context, or the cluster around this pod' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l gone-cluster -d 'A cluster that is gone for good: nothing in it refers to its volumes any more; repeatable' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l min-age -d 'A volume whose record was written within this time may still be in the making' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l quiet -d 'Whoever wrote to a volume within this time may still be at it' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l dry-run -d 'Only tell what would be marked'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -l no-kubernetes -d 'Ask no cluster: volumes of a cluster are then never orphans'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from mark" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l grace -d 'How long a volume must have been marked' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l max-delete -d 'Delete nothing at all if it would be more than so many volumes, or so many of a hundred' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l plan -d 'Write the plan there; with --yes run it, if a new scan comes to the same' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l metrics-file -d 'Write metrics of this run there, for Prometheus: in the folder of node_exporter\'s textfile collector, ending in .prom' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l context -d 'A Kubernetes cluster to ask, by its context in the kubeconfig; repeatable, and all must answer. Without one: the current context, or the cluster around this pod' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l gone-cluster -d 'A cluster that is gone for good: nothing in it refers to its volumes any more; repeatable' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l min-age -d 'A volume whose record was written within this time may still be in the making' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l quiet -d 'Whoever wrote to a volume within this time may still be at it' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l yes -d 'Delete without asking'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l dry-run -d 'Only tell what would be deleted'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -l no-kubernetes -d 'Ask no cluster: volumes of a cluster are then never orphans'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from sweep" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from restore" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l grace -d 'How long a volume must have been marked, as the sweep has it' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand gc-s3; and __fish_seen_subcommand_from status" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -f -a "list" -d 'List the records of all volumes'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -f -a "show" -d 'Show the record of a volume'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and not __fish_seen_subcommand_from list show forget" -f -a "forget" -d 'Remove the record of a volume that has no data any more'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from list" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from show" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand volume; and __fish_seen_subcommand_from forget" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and not __fish_seen_subcommand_from versions" -f -a "versions" -d 'List the known versions, their faults, the guard against each, and the program found'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand zerofs; and __fish_seen_subcommand_from versions" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -l keep -d 'Leave the volume attached at the end, and say how to take it away'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand demo" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and not __fish_seen_subcommand_from serve" -f -a "serve" -d 'Run the CSI driver zerofs.csi.driver'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l endpoint -d 'The unix socket to listen on; a stale one is replaced' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l node-id -d 'The name of this node [default: the host name]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l role -d 'What to serve: node, controller or all' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l runtime -d 'Where ZeroFS runs: process' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l transport -d 'How the block device is made: nbd (by the kernel), fuse, or auto, which takes nbd where it works' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l path -d 'For nbd: guarded (a crash of ZeroFS is only a pause) or direct (it fails the device)' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l reconnect-timeout -d 'For nbd: how long the kernel holds I/O while no keeper serves the device' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l metrics-bind-address -d 'For /metrics, /healthz and /readyz; 0 for none' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l max-volumes -d 'The most volumes that this node takes [default: as many as it has NBD devices; no limit with fuse]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l node -d 'Another node that volumes may be published to; repeatable [default: any, for a controller by itself]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l cluster-id -d 'The Kubernetes cluster that new volumes belong to, for gc-s3: its UID, none, or auto, which asks the cluster around this pod and is none elsewhere' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l storage-url -d 's3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]' -r
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l config -d 'Settings: ConfigMap keys as a plain map, or Kubernetes manifests' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l secret -d 'Secret manifests, if they are not in the --config file; repeatable' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -s o -l output -d 'Print the answer as table, wide, json, yaml or name' -r -f -a "table\t'A table for people'
wide\t'The table with more columns'
json\t'One JSON object'
yaml\t'The same as YAML'
name\t'Bare names, one per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l state-dir -d 'For configs, caches, logs and the embedded store' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l run-dir -d 'For journals, locks and sockets' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l zerofs-bin -d 'The zerofs program; else the one in PATH, or in the tools folder' -r -F
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -l log-format -d 'Write standard error as text or json' -r -f -a "text\t'Lines for people'
json\t'One JSON object per line'"
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -s h -l help -d 'Print this help'
complete -c zerofsctl -n "__fish_zerofsctl_using_subcommand csi; and __fish_seen_subcommand_from serve" -s v -l verbose -d 'Tell more on standard error; -vv for debugging'
