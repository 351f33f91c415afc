# shellcheck shell=bash disable=SC2034,SC2154
# What the job scripts share: flags, messages, and commands that --dry_run prints instead.
#
# A script that sources this sets `arguments=() dry_run=""` and its own flags' defaults first.

exec 3>&1 # Where a dry run prints, also from within $(...).

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$@"
  exit 2
}

# The script's leading comment.
usage() { sed -n -e '/^$/q' -e '/^# /,$s/^# \{0,1\}//p' "$0"; }

# parse_flags "flags with a value" "switches" ARGUMENT...: sets the variable named as each flag.
# What follows `--` goes into the array `arguments`.
parse_flags() {
  local valued=" $1 " switches=" $2 " flag
  shift 2
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --)
        arguments=("${@:2}")
        return
        ;;
      --*) ;;
      *) die "$1 is not a flag; arguments for launch.train come after --" ;;
    esac
    flag=${1%%=*} flag=${flag#--}
    if [[ $switches == *" $flag "* && $1 != *=* ]]; then
      printf -v "$flag" yes
      shift
    elif [[ $valued != *" $flag "* ]]; then
      die "unknown flag ${1%%=*}; -h lists the flags"
    elif [[ $1 == *=* ]]; then
      printf -v "$flag" %s "${1#*=}"
      shift
    elif (($# > 1)) && [[ $2 != --* ]]; then
      printf -v "$flag" %s "$2"
      shift 2
    else
      die "--$flag needs a value"
    fi
  done
}

# require FLAG...: all that are missing are named at once.
require() {
  local flag missing=""
  for flag; do [[ -n ${!flag} ]] || missing+=" --$flag"; done
  [[ -z $missing ]] || die "give$missing; -h says what they are"
}

require_config() {
  require config
  [[ -f $config ]] || die "--config $config: no such file"
}

# A mount's options have no spaces or commas.
require_data() {
  data=${data%/}
  [[ -z $data || $data =~ ^gs://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*$ ]] ||
    die "--data $data: not gs://BUCKET/FOLDER, in letters, digits, dots, dashes and underscores"
}

# require_number FLAG...
require_number() {
  local flag
  for flag; do
    [[ ${!flag} =~ ^(0|[1-9][0-9]{0,5})$ ]] || die "--$flag ${!flag}: not a whole number"
  done
}

# The words as a shell reads them back.
quote() {
  local word space="" escaped="'\\''"
  for word; do
    if [[ -z $word || $word == *[!a-zA-Z0-9_./:=@%+-]* ]]; then
      word="'${word//\'/$escaped}'"
    fi
    printf '%s%s' "$space" "$word"
    space=" "
  done
}

# Runs a command and shows it on standard error; a dry run prints it, as a line of a shell script.
run() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

# What a dry run cannot show, as a comment between its lines.
note() { [[ -z $dry_run ]] || printf '# %s\n' "$*" >&3; }
