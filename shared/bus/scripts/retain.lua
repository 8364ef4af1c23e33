-- Write the finish of answers that have ended, and let all of each expire.
-- KEYS: shards, (record, journal, logprobs)...
-- ARGV: fence, (finish, expiry in ms)...
-- requires: fence
-- requires: typed
for i = 2, #KEYS, 3 do
  if is_a('hash', KEYS[i]) then
    redis.call('HSET', KEYS[i], 'finish', ARGV[at])
    local most = redis.call('HGET', KEYS[i], 'shortened')
    local expiry = math.min(tonumber(ARGV[at + 1]), tonumber(most or ARGV[at + 1]))
    for n = i, i + 2 do redis.call('PEXPIRE', KEYS[n], expiry) end
  end
  at = at + 2
end
