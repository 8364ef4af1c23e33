-- Prelude: `is_a` tells whether a key holds a value of this type. A key of one request, replica or gateway that holds
-- another is damaged, and must not stop those that are named beside it.
local function is_a(kind, key)
  return redis.call('TYPE', key).ok == kind
end
