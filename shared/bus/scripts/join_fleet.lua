-- Write the first lease of a replica, unless its facts differ from those of a living one. Both in one script: of two that
-- differ and join at once, one is refused. The lease of its own former process does not count.
-- KEYS: lease, index of its service, index of each service...
-- ARGV: status, expiry in ms, name, prefix of the lease keys of each service...
-- Returns {lease key, fact, its value there...}; empty if the replica has joined.
-- requires: lease_of
local mine, differences = cjson.decode(ARGV[1]).facts or {}, {}
for i = 3, #KEYS do
  for _, name in ipairs(redis.call('SMEMBERS', KEYS[i])) do
    local key = ARGV[i + 1] .. name
    local lease = key ~= KEYS[1] and lease_of(key)
    local readable, theirs = pcall(cjson.decode, lease or '')
    if readable and type(theirs) == 'table' then
      for fact, value in pairs(theirs.facts or {}) do
        if mine[fact] and mine[fact] ~= value then
          for _, word in ipairs({key, fact, value}) do differences[#differences + 1] = word end
        end
      end
    end
  end
end
if #differences == 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.call('SADD', KEYS[2], ARGV[3])
end
return differences
