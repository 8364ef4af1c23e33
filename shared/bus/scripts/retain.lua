-- Write the finish of answers that have ended, and let all of each expire.
-- KEYS: shards, (record, journal, logprobs)...
-- ARGV: fence, (finish, expiry in ms)...
-- requires: fence
-- requires: typed
for i = 2, #KEYS, 3 do
  if is_a('hash', KEYS[i]) then
    redis.call('HSET', KEYS[i], 'finish', ARGV[at])
    for n = i, i + 2 do redis.call('PEXPIRE', KEYS[n], ARGV[at + 1]) end
  end
  at = at + 2
end
